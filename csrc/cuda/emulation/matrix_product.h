// The arithmetic of the tensor cores' products.
#pragma once

namespace mxmoe {
namespace emulation {

// sums (rows, n) += a (rows, depth) times b (depth, n), all row-major and contiguous, apart from each other; n at
// most 256. With `accumulate` false the sums begin at zero. Products are exact in double, and so nearly is their sum;
// a tensor core drops more. One rounding to float32.
void matrix_product(int rows, int n, int depth, const float* a, const float* b, bool accumulate, float* sums);

}  // namespace emulation
}  // namespace mxmoe
