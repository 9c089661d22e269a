// A file of its own, built without sanitizers: half of the time of the emulated kernels went by here, and what it is
// given are arrays of the emulation's own.
#include "cuda/emulation/matrix_product.h"

namespace mxmoe {
namespace emulation {

void matrix_product(int rows, int n, int depth, const float* a, const float* b, bool accumulate, float* sums) {
  double row_sums[256];
  for (int row = 0; row < rows; ++row, a += depth, sums += n) {
    for (int j = 0; j < n; ++j) row_sums[j] = accumulate ? sums[j] : 0.0;
    for (int k = 0; k < depth; ++k) {
      const double x = a[k];
      for (int j = 0; j < n; ++j) row_sums[j] += x * b[k * n + j];
    }
    for (int j = 0; j < n; ++j) sums[j] = static_cast<float>(row_sums[j]);
  }
}

}  // namespace emulation
}  // namespace mxmoe
