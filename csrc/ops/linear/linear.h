// linear, linear_group
// Computes: y = x W^T + bias + residual; the group: several such layers of one x, their results side by side.
// Shapes:   x (num_tokens, in_features); weight (out_features, in_features); scales (out_features, in_features / 32);
//           or both packed (see ops/pack): (out_features / 16, in_features / 32, 512), scales without the 512 but 16;
//           bias (out_features) or none; residual, y (num_tokens, out_features), residual or none. Of a group y has
//           the sum of the layers' out_features.
// Dtypes:   x float32 or bfloat16; weight bfloat16, or int8 (packed: uint8) with bfloat16 scales per block of 32;
//           bias bfloat16 or float32; residual, y float32. Rounding happens once to x, as `activations` says:
//           float32 none, bf16 to bfloat16, int8 to 127 steps of each block's largest magnitude (int8 with
//           bf16 weights rounds to bfloat16: there is no integer dot to win). Weights enter exactly (but for
//           subnormal bfloat16, which AVX-512's bf16 dot products count as zero); sums are float32, a block's
//           integer products exact.
// Layout:   rows contiguous; x, residual, y and stored weight and scales may have a row stride.
// Requires: in_features >= 1; a multiple of 32 when weight is int8.
// Calls:    y may be residual itself; no other overlap; tiles of (tokens x out_features) are spread over threads;
//           scratch for the rounded x; a row's bits depend on that row alone, within one instruction set, and not on
//           whether the weights are packed.
// Source:   model card section 2; block quantisation as in Dettmers et al. 2022, section 2.
#pragma once

#include <vector>

#include "core/types.h"
#include "simd/dot.h"

namespace mxmoe {

struct LinearWeights {
  Tensor weight, scales, bias;
};
void linear(const Tensor& x, const LinearWeights& w, Activations activations, const Tensor& residual,
            const Tensor& y);
void linear_group(const Tensor& x, const std::vector<LinearWeights>& layers, Activations activations,
                  const Tensor& y);

// Weight rows [n_begin, n_end) against prepared rows [m_begin, m_end). bias and residual may be null.
struct LinearTile {
  PreparedRows x;
  int64_t m_begin, m_end;
  WeightRows weight;
  int64_t n_begin, n_end;
  int64_t in_features;
  const float* bias_f32;
  const bf16* bias_bf16;
  const float* residual;
  int64_t residual_stride;
  float* y;
  int64_t y_stride;
};

struct LinearKernel {
  PrepareFn prepare;
  int value_bytes;   // of one prepared value
  int block_floats;  // what they carry beside the values of a block of 32
  int row_step;      // n_begin is a multiple of it
  void (*tile)(const LinearTile&);
};

// <activation>_<weight>
struct LinearKernels {
  LinearKernel f32_bf16, bf16_bf16, f32_int8, bf16_int8, int8_int8;
};
extern const LinearKernels linear_scalar, linear_avx2, linear_avx512;
// With VNNI and BF16 dot products.
extern const LinearKernel linear_bf16_bf16_avx512x, linear_bf16_int8_avx512x, linear_int8_int8_avx512x;

}  // namespace mxmoe
