// rmsnorm
// Computes: y = x / sqrt(mean(x^2) + eps) * weight, for every row.
// Shapes:   x, y (num_tokens, hidden_size); weight (hidden_size).
// Dtypes:   x, weight, y float32 or bfloat16, each on its own; float32 inside, one rounding at y.
// Layout:   rows contiguous; x and y may have a row stride.
// Requires: hidden_size >= 1; eps >= 0 and finite.
// Calls:    y may be x itself, no other overlap; rows are spread over threads; no scratch; a row's bits
// depend on
//           that row alone.
// CUDA:     rmsnorm_sm80_kernel: a block a row; elements go to threads by their index alone, so that
//           bits depend on neither the row's address nor its neighbours.
// Source:   Zhang and Sennrich 2019, equation 4; model card section 2.1.
#pragma once

#include "core/types.h"

namespace mxmoe {

void check_rmsnorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& y);
void rmsnorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& y);

struct RmsnormRow {
  const void* x;
  DType x_dtype;
  const void* weight;
  DType weight_dtype;
  void* y;
  DType y_dtype;
  int64_t hidden_size;
  float eps;
};
using RmsnormKernel = void (*)(const RmsnormRow&);

void rmsnorm_scalar(const RmsnormRow&);
void rmsnorm_avx2(const RmsnormRow&);
void rmsnorm_avx512(const RmsnormRow&);

namespace cuda {
class Stream;
void rmsnorm(Stream& stream, const Tensor& x, const Tensor& weight, float eps, const Tensor& y);
}  // namespace cuda

}  // namespace mxmoe
