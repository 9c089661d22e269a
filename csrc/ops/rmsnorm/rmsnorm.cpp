#include "ops/rmsnorm/rmsnorm.h"

#include <cmath>

#include "core/check.h"
#include "core/isa.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {
Dispatch<RmsnormKernel> table("rmsnorm", {MXMOE_X86({"rmsnorm_avx512", kAvx512, rmsnorm_avx512},
                                                    {"rmsnorm_avx2", kAvx2, rmsnorm_avx2}){"rmsnorm_scalar", 0,
                                                                                           rmsnorm_scalar}});
}  // namespace

void rmsnorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& y) {
  check_dtype("x", x, {DType::f32, DType::bf16});
  check_dtype("weight", weight, {DType::f32, DType::bf16});
  check_dtype("out", y, {DType::f32, DType::bf16});
  check_shape("x", x, {-1, -1}, "(num_tokens, hidden_size)");
  check_shape("weight", weight, {x.shape[1]}, "(hidden_size,)");
  check_shape("out", y, {x.shape[0], x.shape[1]}, "(num_tokens, hidden_size)");
  check_value(x.shape[1] >= 1, "x has hidden_size 0; wanted at least 1");
  check_value(std::isfinite(eps) && eps >= 0.0f, "eps is ", eps, "; wanted a finite number, 0 or more");
  const bool in_place = x.data == y.data && x.dtype == y.dtype && x.stride[0] == y.stride[0];
  if (!in_place) check_no_overlap("out", y, "x", x);
  check_no_overlap("out", y, "weight", weight);

  const RmsnormKernel kernel = table.pick();
  const int64_t x_row = x.stride[0] * dtype_size(x.dtype), y_row = y.stride[0] * dtype_size(y.dtype);
  parallel_for(x.shape[0], [&](int64_t row) {
    kernel({x.as<char>() + row * x_row, x.dtype, weight.data, weight.dtype, y.as<char>() + row * y_row, y.dtype,
            x.shape[1], eps});
  });
}

}  // namespace mxmoe
