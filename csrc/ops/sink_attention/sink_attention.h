// sink_attention
// Computes: for every query at position i of its sequence and every head h with key/value head h / (Hq / Hkv):
//           s_j = sm_scale * q . k_j over the visible keys j <= i, on sliding layers only those with
//           i - j < sliding_window; y = sum_j exp(s_j - m) v_j / (sum_j exp(s_j - m) + exp(sink_h - m)).
//           sink_share, when wanted, is exp(sink_h - m) over the same denominator.
// Shapes:   q, y (num_tokens, num_attention_heads, head_dim), the new tokens of all sequences one after the other;
//           caches as in kv_cache; sinks (num_attention_heads); cu_seqlens (num_sequences + 1), where each sequence's
//           new tokens begin; seq_lens (num_sequences), keys of each sequence, the new tokens' own included;
//           block_table (num_sequences, max_blocks), the cache block that holds keys [b * block_size, (b + 1) *
//           block_size); sink_share (num_tokens, num_attention_heads).
// Dtypes:   q, y, sinks float32 or bfloat16; caches float32, bfloat16 or int8 with float32 scales; tables int32;
//           sink_share float32. Keys and values are widened exactly; sums and softmax are float32; one rounding at y.
// Layout:   q and y contiguous but for a token stride; the rest contiguous.
// Units:    sliding_window in keys, the query's own included; 0 means full attention.
// Requires: the new tokens' keys are already in the cache; head_dim <= 256; Hq a multiple of Hkv; block_table entries
//           of blocks with a visible key within [0, num_blocks), others are not looked at.
// Calls:    no overlap; (sequence x key/value head x queries) is spread over threads; no scratch; keys are taken in
//           blocks of 64 at fixed positions, so that a row's bits depend neither on its neighbours, nor on how the
//           prompt was split, nor on the paging.
// Source:   model card section 2.3; Dao 2023 (FlashAttention-2) section 3.1; Xiao et al. 2023 (attention sinks).
#pragma once

#include "core/types.h"
#include "ops/kv_cache/kv_cache.h"

namespace mxmoe {

struct AttentionBatch {
  Tensor cu_seqlens, seq_lens, block_table;
};

void sink_attention(const Tensor& q, const KvCache& cache, const Tensor& sinks, const AttentionBatch& batch,
                    float sm_scale, int64_t sliding_window, const Tensor& sink_share, const Tensor& y);

constexpr int kMaxHeadDim = 256;
constexpr int kAttentionRows = 64;  // queries x heads of one item
constexpr int kAttentionKeys = 64;  // keys of one step, at multiples of 64

// Rows of one sequence that share a key/value head: tokens [0, num_tokens) x heads [0, num_heads), at most
// kAttentionRows. Pointers are to the first token and head.
struct AttentionItem {
  const void* q;
  DType q_dtype;
  int64_t q_token_stride;  // elements
  void* y;
  DType y_dtype;
  int64_t y_token_stride;
  float* sink_share;  // or null
  int64_t share_token_stride;
  const float* sinks;  // of the first head on
  int64_t num_tokens, num_heads, head_dim;
  int64_t first_position;  // of the first token
  int64_t sliding_window;  // 0: full
  float sm_scale;
  const void* k;  // of key/value head 0 in block 0
  const void* v;
  const float* k_scales;
  const float* v_scales;
  DType kv_dtype;
  int64_t kv_head, num_kv_heads, block_size;
  const int32_t* blocks;  // this sequence's row of the block table
};
using AttentionKernel = void (*)(const AttentionItem&);

void sink_attention_scalar(const AttentionItem&);
void sink_attention_avx2(const AttentionItem&);
void sink_attention_avx512(const AttentionItem&);

}  // namespace mxmoe
