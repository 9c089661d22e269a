#include <cmath>

#include "core/check.h"
#include "ops/rmsnorm/rmsnorm.h"

namespace mxmoe {

void check_rmsnorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& y) {
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
}

}  // namespace mxmoe
