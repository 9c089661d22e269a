#include "ops/rmsnorm/rmsnorm.h"

#include "core/isa.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {
Dispatch<RmsnormKernel> table("rmsnorm", {MXMOE_X86({"rmsnorm_avx512", kAvx512, rmsnorm_avx512},
                                                    {"rmsnorm_avx2", kAvx2, rmsnorm_avx2}){"rmsnorm_scalar", 0,
                                                                                           rmsnorm_scalar}});
}  // namespace

void rmsnorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& y) {
  check_rmsnorm(x, weight, eps, y);
  const RmsnormKernel kernel = table.pick();
  const int64_t x_row = x.stride[0] * dtype_size(x.dtype), y_row = y.stride[0] * dtype_size(y.dtype);
  parallel_for(x.shape[0], [&](int64_t row) {
    kernel({x.as<char>() + row * x_row, x.dtype, weight.data, weight.dtype, y.as<char>() + row * y_row, y.dtype,
            x.shape[1], eps});
  });
}

}  // namespace mxmoe
