#include "core/check.h"
#include "ops/rope/rope.h"

namespace mxmoe {

void check_rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y) {
  check_dtype("x", x, {DType::f32, DType::bf16});
  check_dtype("cos", cos, {DType::f32});
  check_dtype("sin", sin, {DType::f32});
  check_dtype("out", y, {DType::f32, DType::bf16});
  check_shape("x", x, {-1, -1, -1}, "(num_tokens, num_heads, head_dim)");
  const int64_t num_tokens = x.shape[0], num_heads = x.shape[1], head_dim = x.shape[2];
  check_value(head_dim >= 2 && head_dim % 2 == 0, "x has head_dim ", head_dim, "; wanted an even number, 2 or more");
  check_shape("cos", cos, {num_tokens, head_dim / 2}, "(num_tokens, head_dim / 2)");
  check_shape("sin", sin, {num_tokens, head_dim / 2}, "(num_tokens, head_dim / 2)");
  check_shape("out", y, {num_tokens, num_heads, head_dim}, "(num_tokens, num_heads, head_dim)");
  check_contiguous("cos", cos);
  check_contiguous("sin", sin);
  for (const auto* t : {&x, &y}) {
    check_value(num_heads <= 1 || t->stride[1] == head_dim, t == &x ? "x" : "out", " has a head stride of ",
                t->stride[1], " elements; wanted ", head_dim);
  }
  const bool in_place = x.data == y.data && x.dtype == y.dtype && x.stride[0] == y.stride[0];
  if (!in_place) check_no_overlap("out", y, "x", x);
  check_no_overlap("out", y, "cos", cos);
  check_no_overlap("out", y, "sin", sin);
}

}  // namespace mxmoe
