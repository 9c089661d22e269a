// rope
// Computes: rotary position embedding, half-split: with x1, x2 the halves of a head,
//           y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin. rope_inv_freq gives YaRN's frequencies, rope_cos_sin
//           the table rows of given positions.
// Shapes:   x, y (num_tokens, num_heads, head_dim); cos, sin (num_tokens, head_dim / 2); positions
// (num_tokens). Dtypes:   x, y float32 or bfloat16, each on its own; cos and sin float32; inv_freq float64;
// positions int64.
//           Angles are float64 (position 131071 needs it), float32 inside rope, one rounding at y.
// Layout:   the last two axes contiguous; x and y may have a token stride.
// Units:    angles in radians; inv_freq in radians per token.
// Requires: head_dim even; positions >= 0.
// Calls:    y may be x itself, no other overlap; tokens are spread over threads; no scratch.
// CUDA:     rope as above. rope_kv_write: one launch for what decoding does between the projections and attention.
//           qkv (num_tokens, (num_attention_heads + 2 num_key_value_heads) * head_dim) float32 holds a token's
//           queries, keys and values, to which bias (that many) or none is added; cos and sin are tables
//           (max_positions, head_dim / 2) that positions (num_tokens) int64 index; queries go rotated to q
//           (num_tokens, num_attention_heads, head_dim) float32 or bfloat16, keys rotated and values as they are to
//           their slots (int64) of a float32 or bfloat16 cache. A slot or position out of range writes nothing, but
//           for a row of NaN in q. A slot must not be named twice.
// Source:   Su et al. 2021, section 3.4.2; Peng et al. 2023 (YaRN), sections 3.2 and 3.4; model card
// section 2.3.
#pragma once

#include "core/types.h"
#include "ops/kv_cache/kv_cache.h"

namespace mxmoe {

struct YarnParams {
  double theta, factor;
  int64_t original_max_position_embeddings;
  double beta_fast, beta_slow;
  bool truncate;
};

// Writes head_dim / 2 frequencies and returns the factor that cos and sin are multiplied by.
double rope_inv_freq(int64_t head_dim, const YarnParams& yarn, double* inv_freq);
void rope_cos_sin(const Tensor& positions, const Tensor& inv_freq, double scaling, const Tensor& cos,
                  const Tensor& sin);
void check_rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y);
void rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y);

struct RopeToken {
  const void* x;
  DType x_dtype;
  void* y;
  DType y_dtype;
  const float* cos;
  const float* sin;
  int64_t num_heads, head_dim;
};
using RopeKernel = void (*)(const RopeToken&);

void rope_scalar(const RopeToken&);
void rope_avx2(const RopeToken&);
void rope_avx512(const RopeToken&);

namespace cuda {
class Stream;
void rope(Stream& stream, const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y);

struct RopeTables {
  Tensor cos, sin, positions;
};
void rope_kv_write(Stream& stream, const Tensor& qkv, const Tensor& bias, const RopeTables& tables,
                   const Tensor& slots, const KvCache& cache, const Tensor& q);
}  // namespace cuda

}  // namespace mxmoe
