// linear, linear_group
// Computes: y = x W^T + bias + residual; the group: several such layers of one x, their results side by side.
// Shapes:   x (num_tokens, in_features); weight (out_features, in_features); scales (out_features, in_features / 32);
//           or both packed (see ops/pack): (out_features / 16, in_features / 32, 512), scales without the 512 but 16;
//           bias (out_features) or none; residual, y (num_tokens, out_features), residual or none. Of a group y has
//           the sum of the layers' out_features.
// Dtypes:   x float32 or bfloat16; weight bfloat16, or int8 (packed: uint8) with bfloat16 scales per block of 32;
//           bias bfloat16 or float32; residual, y float32. Rounding happens once to x, as `activations` says:
//           float32 none, bf16 to bfloat16, int8 to 127 steps of each block's largest magnitude (int8 with
//           bf16 weights rounds to bfloat16: there is no integer dot to win). Where the CPU has no fast bf16 dot
//           products, bf16 meets int8 and MXFP4 weights as 16-bit integers: of each block of 32, what is below a
//           128th of the power of two in its largest magnitude is rounded to 2^-14 of that power, in addition (of
//           the next power where that magnitude's eight bits are all ones).
//           Weights enter exactly (but for subnormal bfloat16, which AVX-512's bf16 dot products count as zero); sums
//           are float32, a block's integer products exact.
// Layout:   rows contiguous; x, residual, y and stored weight and scales may have a row stride, packed ones any
//           strides but for the last axis.
// Requires: in_features >= 1; a multiple of 32 when weight is int8.
// Calls:    y may be residual itself; no other overlap; tiles of (tokens x out_features) are spread over threads;
//           scratch for the rounded x; a row's bits depend on that row alone, with one kernel, and not on
//           whether the weights are packed.
// CUDA:     bfloat16 weights as stored; activations float32 or bf16. linear_bf16_bf16_sm80_kernel and
//           linear_bf16_bf16_gemv_sm80_kernel multiply with mma.sync in slices of 384 along K, each summed from zero
//           and the sums added in order, with the same assignment of K to the instruction's: a row's bits are the
//           same from either, so that they do not depend on the number of tokens. linear_f32_bf16_sm80_kernel uses no
//           tensor cores. Scratch for a float32 x, rounded, past 64 tokens; up to there linear_group is one launch
//           for every 4 layers.
// Source:   model card section 2; block quantisation as in Dettmers et al. 2022, section 2.
#pragma once

#include <vector>

#include "core/types.h"
#include "simd/dot.h"

namespace mxmoe {

struct LinearWeights {
  Tensor weight, scales, bias;
};
// Return the out_features of each layer.
int64_t check_linear(const Tensor& x, const LinearWeights& w, const Tensor& residual, const Tensor& y);
std::vector<int64_t> check_linear_group(const Tensor& x, const std::vector<LinearWeights>& layers, const Tensor& y);
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
  int second_bytes = 0;  // of one prepared value in a second form, the same number if any
};

// <activation>_<weight>
struct LinearKernels {
  LinearKernel f32_bf16, bf16_bf16, f32_int8, bf16_int8, int8_int8;
};
extern const LinearKernels linear_scalar, linear_avx2, linear_avx512;
extern const LinearKernel linear_int8_int8_avxvnni, linear_int8_int8_avx512vnni;
extern const LinearKernel linear_bf16_int8_avxvnni, linear_bf16_int8_avx512vnni;
extern const LinearKernel linear_bf16_bf16_avx512x, linear_bf16_int8_avx512x;  // with BF16 dot products

namespace cuda {
class Stream;
void linear(Stream& stream, const Tensor& x, const LinearWeights& w, Activations activations, const Tensor& residual,
            const Tensor& y);
void linear_group(Stream& stream, const Tensor& x, const std::vector<LinearWeights>& layers, Activations activations,
                  const Tensor& y);
}  // namespace cuda

}  // namespace mxmoe
