// mxfp4_moe
// Computes: for every token t, y[t] = residual[t] + sum_c topk_weights[t, c] * expert(topk_ids[t, c], x[t]), where
//           expert(e, x): g = W1[e] x + b1[e]; gate = min(g[0::2], limit); up = clamp(g[1::2], -limit, limit); a =
//           gate * sigmoid(alpha * gate) * (up + 1); W2[e] a + b2[e].
// Shapes:   x (num_tokens, hidden_size); topk_ids, topk_weights (num_tokens, experts_per_token);
//           gate_up_blocks (num_experts, 2 * intermediate_size, hidden_size / 32, 16), gate_up_scales without
//           the 16; gate_up_bias (num_experts, 2 * intermediate_size); down_blocks (num_experts, hidden_size,
//           intermediate_size / 32, 16), down_scales likewise; down_bias (num_experts, hidden_size); or blocks and
//           scales packed (see ops/pack), both matrices alike: (num_experts, rows / 16, K / 32, 256) and (.., 16);
//           residual, y (num_tokens, hidden_size), residual or none.
// Dtypes:   x float32 or bfloat16; ids int32; weights float32; blocks and scales uint8 (MXFP4: e2m1 codes, low
//           nibble first, e8m0 scales); biases bfloat16 or float32; residual, y float32. x and the
//           activations a are rounded once each, as `activations` says (see linear); MXFP4 enters exactly;
//           sums are float32, the sum over choices in their order.
// Layout:   contiguous; x, residual and y may have a row stride, packed blocks and scales any strides but for
//           the last axis.
// Requires: hidden_size and intermediate_size multiples of 32; experts held are [first_expert, first_expert +
//           num_experts), other ids contribute nothing: partial sums of several holders add up. No scale byte
//           is 255 (checked when a checkpoint is loaded, not here).
// Calls:    y may be residual itself; no other overlap; (expert x weight rows) are spread over threads; scratch for
//           num_tokens * experts_per_token rows; a row's bits depend on that row alone, with one kernel,
//           and not on whether the weights are packed.
// CUDA:     weights as stored, at most 1024 experts held; activations float32 or bf16. topk_ids lie on the device: an
//           id that is not held contributes nothing, be it negative. Up to 512 pairs of token and choice take two
//           launches; more are sorted by expert first. float32: no tensor cores. bf16: mma.sync, a block's sum
//           multiplied by its scale, so that no scale is out of range; on sm_90a with foldable_scales (the caller's
//           word that every scale byte is 2 to 128), blocks at 16 bytes and unless sm_80 is forced: wgmma, scales
//           folded into the weights, exactly. Kernels of one kind sum alike: a row's bits depend on that row alone.
//           Scratch for 4096 tokens at a time.
// Source:   model card section 2.2; OCP Microscaling v1.0 section 5; gpt_oss/torch/model.py, MLPBlock.
#pragma once

#include "core/types.h"
#include "simd/dot.h"

namespace mxmoe {

struct MoeWeights {
  Tensor gate_up_blocks, gate_up_scales, gate_up_bias;
  Tensor down_blocks, down_scales, down_bias;
};

struct MoeParams {
  Activations activations = Activations::bf16;
  float swiglu_alpha = 1.702f, swiglu_limit = 7.0f;
  int64_t first_expert = 0;
  bool foldable_scales = false;  // every scale byte is 2 to 128; for GPUs
};

// All but the values of topk_ids.
void check_mxfp4_moe(const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights, const MoeWeights& weights,
                     const MoeParams& params, const Tensor& residual, const Tensor& y);
void mxfp4_moe(const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights, const MoeWeights& weights,
               const MoeParams& params, const Tensor& residual, const Tensor& y);

// Weight rows [n_begin, n_end) of one expert against the activation rows listed in `rows`; output i belongs
// to rows[i]. gate_up writes SwiGLU of row pairs, n_end - n_begin even; down writes dot + bias.
struct MoeTile {
  PreparedRows x;
  const int64_t* rows;
  int64_t num_rows;
  WeightRows weight;
  int64_t n_begin, n_end;
  int64_t k;
  const float* bias_f32;
  const bf16* bias_bf16;
  float alpha, limit;
  float* y;
  int64_t y_stride;
};

struct MoeKernel {
  PrepareFn prepare, prepare_for_packed;  // what stored and packed weights want the activations to look like
  int value_bytes;                        // of one prepared value
  int block_floats;                       // what they carry beside the values of a block of 32
  void (*gate_up)(const MoeTile&);
  void (*down)(const MoeTile&);
  int second_bytes = 0;  // of one prepared value in a second form, the same number if any
};

struct MoeKernels {
  MoeKernel f32, bf16, int8;  // by activation
};
extern const MoeKernels mxfp4_moe_scalar, mxfp4_moe_avx2, mxfp4_moe_avx512;
extern const MoeKernel mxfp4_moe_int8_avxvnni, mxfp4_moe_int8_avx512vnni;
extern const MoeKernel mxfp4_moe_bf16_avxvnni, mxfp4_moe_bf16_avx512vnni;
extern const MoeKernel mxfp4_moe_bf16_avx512x;  // with BF16 dot products

// y[i] = residual[i] + sum_c weights[c] * rows[c][i]; a null row is skipped, a null residual counts as zero.
struct CombineRow {
  const float* residual;
  const float* const* rows;
  const float* weights;
  int64_t num_rows;
  float* y;
  int64_t n;
};
using CombineKernel = void (*)(const CombineRow&);
void combine_scalar(const CombineRow&);
void combine_avx2(const CombineRow&);
void combine_avx512(const CombineRow&);

namespace cuda {
class Stream;
void mxfp4_moe(Stream& stream, const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights,
               const MoeWeights& weights, const MoeParams& params, const Tensor& residual, const Tensor& y);
}  // namespace cuda

}  // namespace mxmoe
