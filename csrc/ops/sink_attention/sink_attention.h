// sink_attention
// Computes: for every query at position i of its sequence and every head h with key/value head h / (Hq / Hkv):
//           s_j = sm_scale * q . k_j over the visible keys j <= i, on sliding layers only those with
//           i - j < sliding_window; y = sum_j exp(s_j - m) v_j / (sum_j exp(s_j - m) + exp(sink_h - m)).
//           sink_share, when wanted, is exp(sink_h - m) over the same denominator.
// Shapes:   q, y (num_tokens, num_attention_heads, head_dim), the new tokens of all sequences one after the other;
//           caches as in kv_cache; sinks (num_attention_heads); cu_seqlens (num_sequences + 1), where each sequence's
//           new tokens begin; seq_lens (num_sequences), keys of each sequence, the new tokens' own included;
//           block_table (num_sequences, max_blocks), the cache block that holds places [b * block_size, (b + 1) *
//           block_size); key_starts (num_sequences) or none, the place of each sequence's first key, else 0;
//           sink_share (num_tokens, num_attention_heads).
// Dtypes:   q, y, sinks float32 or bfloat16; caches float32, bfloat16 or int8 with float32 scales; tables int32;
//           sink_share float32. Sums and softmax are float32; one rounding at y. With a float32 cache or
//           Activations::f32 nothing else is rounded: keys and values are widened exactly. Otherwise (bf16 or i8) two
//           things are: q, to bfloat16 for a bfloat16 cache, to whole multiples of a head's amax / 16256 for an int8
//           one; and the weights exp(s_j - m), m a running maximum of the scores, to bfloat16 as they multiply the
//           values. The denominator sums the weights so rounded. An int8 cache's key scales multiply the scores, its
//           value scales the weights before their rounding; there the denominator sums the weights with neither scale
//           nor rounding. Where an int8 cache meets integers (AVX-512 with VNNI), m is the maximum of a row's step
//           for its weights, and with their scales they are rounded to 32768ths of the largest there.
// Layout:   q and y contiguous but for a token stride; strides of float32 and bfloat16 caches are multiples of
//           head_dim, each cache's its own; the rest contiguous.
// Units:    sliding_window in keys, the query's own included; 0 means full attention.
// Requires: the new tokens' keys are already in the cache; head_dim <= 256; Hq a multiple of Hkv; block_table entries
//           of blocks with a visible key within [0, num_blocks), others are not looked at; value scales 0 or more
//           (one below may make the rows that see it NaN); seq_lens + key_starts >= new tokens. A new token before
//           its sequence's first key (padding) sees no key: y is 0, its share 1 (0 for a sink of -infinity).
// Calls:    no overlap; (sequence x key/value head x queries) is spread over threads, and where that is too little
//           work for them, (x chunk of keys), which takes scratch for the chunks' sums. Keys are taken in steps of 64
//           and summed up by chunks of 1024, both at fixed positions, and chunks are merged in order, so that a row's
//           bits depend neither on its neighbours or the threads, nor on how the prompt was split, nor on the paging,
//           the places before the first key or the caches' strides.
// CUDA:     contiguous caches. Tables lie on the device and are not looked at beforehand: cu_seqlens must not fall
//           and must end at num_tokens; a block out of range counts as keys that nobody sees. bfloat16 and int8
//           caches with rounding and a head_dim of 32, 64 or 128 take sink_attention_bf16_sm80_kernel (mma.sync) or
//           its _split form, which give the same bits: keys are summed in chunks of 128, each from nothing, and
//           chunks merged in order, the sink last; a query for an int8 cache goes in as two parts that bfloat16
//           holds. On Hopper a bfloat16 cache with a head_dim of 64 takes sink_attention_bf16_sm90_kernel (wgmma) or
//           its _split form: the same, but for m, which is the maximum of a whole chunk instead of a running one. The
//           rest take sink_attention_simt_sm80_kernel. A row's bits depend neither on its neighbours nor on how the
//           prompt was split; but a value of a bfloat16 cache that is not finite also reaches rows that do not see it
//           of the same tile of 16, on Hopper of the same 192. max_seq_len bounds seq_lens and sizes the grid: what
//           lies past it is not seen.
// Source:   model card section 2.3; Dao 2023 (FlashAttention-2) section 3.1; Xiao et al. 2023 (attention sinks).
#pragma once

#include "core/types.h"
#include "ops/kv_cache/kv_cache.h"

namespace mxmoe {

struct AttentionBatch {
  Tensor cu_seqlens, seq_lens, block_table, key_starts;
};

// All but what the tables say.
void check_sink_attention(const Tensor& q, const KvCache& cache, const Tensor& sinks, const AttentionBatch& b,
                          float sm_scale, int64_t sliding_window, const Tensor& sink_share, const Tensor& y);
void sink_attention(const Tensor& q, const KvCache& cache, const Tensor& sinks, const AttentionBatch& batch,
                    float sm_scale, int64_t sliding_window, Activations activations, const Tensor& sink_share,
                    const Tensor& y);

constexpr int kMaxHeadDim = 256;
constexpr int kAttentionRows = 64;         // queries x heads of one item
constexpr int kAttentionKeys = 64;         // keys of one step, at multiples of 64
constexpr int64_t kAttentionChunk = 1024;  // keys that are summed before they meet the others
constexpr int64_t kPartialHead = 16;       // maximum and denominator, and what keeps the values aligned
// Floats of a row's sums over one chunk.
inline int64_t partial_size(int64_t head_dim) { return kPartialHead + (head_dim + 15) / 16 * 16; }

// Strides of a cache in rows of head_dim values.
struct CacheRows {
  int64_t block, head, key;
  int64_t of(int64_t in_block, int64_t in_head, int64_t offset) const {
    return in_block * block + in_head * head + offset * key;
  }
};

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
  CacheRows k_rows, v_rows;
  int64_t kv_head, block_size;
  const int32_t* blocks;           // this sequence's row of the block table
  int64_t key_start;               // place of the sequence's first key in its blocks
  int64_t begin_chunk, end_chunk;  // of the keys to look at
  // Where chunks are computed apart: [chunk - partial_chunk][row][partial_size]. Null when this item has them all.
  float* partial;
  int64_t partial_chunk;
};

struct AttentionKernel {
  void (*attend)(const AttentionItem&);  // writes y and sink_share, or partial sums
  void (*merge)(const AttentionItem&);   // reads partial sums, writes y and sink_share
};
struct AttentionKernels {  // float32 throughout; q and weights rounded
  AttentionKernel f32, bf16;
};
extern const AttentionKernels sink_attention_scalar, sink_attention_avx2, sink_attention_avx512;
extern const AttentionKernel sink_attention_bf16_avx512x;

namespace cuda {
class Stream;
void sink_attention(Stream& stream, const Tensor& q, const KvCache& cache, const Tensor& sinks,
                    const AttentionBatch& batch, int64_t max_seq_len, float sm_scale, int64_t sliding_window,
                    Activations activations, const Tensor& sink_share, const Tensor& y);
}  // namespace cuda

}  // namespace mxmoe
