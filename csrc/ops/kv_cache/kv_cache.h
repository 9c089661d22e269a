// kv_cache
// Computes: copies the keys and values of new tokens into their slots of a paged cache, rounding to its dtype.
// Shapes:   k, v (num_tokens, num_key_value_heads, head_dim); k_cache, v_cache (num_blocks, num_key_value_heads,
//           block_size, head_dim); slots (num_tokens); k_scales, v_scales (num_blocks, num_key_value_heads,
//           block_size), only with an int8 cache.
// Dtypes:   k, v float32 or bfloat16; caches float32, bfloat16 or int8; slots int64; scales float32. bfloat16 rounds
//           to nearest even; int8 is round(x / scale) with scale = amax / 127 of the token's head.
// Layout:   caches and scales contiguous; k and v may have a token stride.
// Units:    slot = block * block_size + offset in the block.
// Requires: 0 <= slots < num_blocks * block_size; k and v finite when the cache is int8 (else the scale is NaN).
// Calls:    in place on the caches; no overlap; a slot named twice keeps the later token; heads of many tokens are
//           spread over threads; no scratch; the bits are those of every instruction set and number of threads.
// CUDA:     the same bits; slots lie on the device: one out of range writes nothing, and where two
//           tokens have one slot either may stay. kv_cache_advance: what the host does between decoding steps, in one
//           launch: every sequence gets one token more. seq_lens (num_sequences) int32 goes up by one in place,
//           positions (num_sequences) int64 is the new token's, and for each of up to 4 block tables
//           (num_sequences, max_blocks) int32 slots (num_sequences) int64 says where it goes; -1, which writes
//           nothing, where the table has no block for it.
// Source:   Kwon et al. 2023 (PagedAttention), section 4.
#pragma once

#include <vector>

#include "core/types.h"

namespace mxmoe {

struct KvCache {
  Tensor k, v, k_scales, v_scales;
};

void check_kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache);
void kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache);

// All tokens of one head, in order.
struct KvRows {
  const void* x;  // of the first token and head
  DType x_dtype;
  int64_t x_token_stride;  // elements
  void* cache;
  DType cache_dtype;
  float* scales;  // int8 only
  const int64_t* slots;
  int64_t num_tokens, head, num_heads, block_size, head_dim;
};
using KvKernel = void (*)(const KvRows&);

void kv_cache_write_scalar(const KvRows&);
void kv_cache_write_avx2(const KvRows&);
void kv_cache_write_avx512(const KvRows&);

// Shapes and dtypes of a cache, for every op that takes one.
void check_kv_cache_shape(const KvCache& cache);

namespace cuda {
class Stream;
void kv_cache_write(Stream& stream, const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache);

constexpr size_t kMaxTables = 4;
struct SlotTable {
  Tensor block_table, slots;
};
void kv_cache_advance(Stream& stream, const Tensor& seq_lens, const Tensor& positions,
                      const std::vector<SlotTable>& tables, int64_t block_size);
}  // namespace cuda

}  // namespace mxmoe
