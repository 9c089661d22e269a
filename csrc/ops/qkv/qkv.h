// qkv
// Computes: rmsnorm_qkv_rope: what stands before attention, for few tokens: h = rmsnorm(x); queries, keys and values
//           of it as linear_group makes them, biases added; queries and keys rotated (see rope); keys and values
//           written to their slots of a paged cache (see kv_cache), queries to q.
// Shapes:   x (num_tokens, hidden_size); norm_weight (hidden_size); weight and bias of queries (num_attention_heads *
//           head_dim, hidden_size) and without the latter, of keys and values with num_key_value_heads; cos, sin
//           (max_positions, head_dim / 2); positions, slots (num_tokens); caches (num_blocks, num_key_value_heads,
//           block_size, head_dim); q (num_tokens, num_attention_heads, head_dim).
// Dtypes:   x, cos, sin float32; norm_weight and weights bfloat16, biases bfloat16 or float32 or none; positions,
//           slots int64; caches float32 or bfloat16, q as they. h is rounded to bfloat16, each result once to its
//           dtype; everything between is float32.
// Layout:   rows contiguous and, of weights, aligned to 16 bytes; x, weights and q may have a row stride; the rest
//           contiguous.
// Requires: hidden_size a multiple of 8, head_dim of 16.
// Calls:    on a GPU alone; no overlap. A position out of range gives NaN in q and writes nothing; a slot out of
//           range writes nothing, and none must be named twice. The bits are those of rmsnorm, linear_group with
//           activations bf16, rope and kv_cache_write one after the other, whatever the number of tokens. One launch
//           for up to 8 tokens (hidden_size at most 4032; fewer past that), two for more; scratch for h then.
// Source:   model card sections 2.1 and 2.3.
#pragma once

#include "core/types.h"
#include "ops/kv_cache/kv_cache.h"
#include "ops/linear/linear.h"
#include "ops/rope/rope.h"

namespace mxmoe {
namespace cuda {

class Stream;
struct QkvLayers {
  Tensor norm_weight;
  float eps;
  LinearWeights q, k, v;
};
void rmsnorm_qkv_rope(Stream& stream, const Tensor& x, const QkvLayers& layers, const RopeTables& tables,
                      const Tensor& slots, const KvCache& cache, const Tensor& q);

}  // namespace cuda
}  // namespace mxmoe
