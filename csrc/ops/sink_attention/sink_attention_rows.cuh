// What attention's CUDA kernels share: which rows a tile holds, which keys they see, and how partial sums meet.
//
// A row is a (token, head) pair; the rows of one sequence that share a key/value head are numbered token by token.
// Keys are summed in chunks at fixed positions, each from nothing; chunks meet in order, the sink last. Arithmetic
// that must give the same bits in several kernels is spelled with intrinsics, which no compiler contracts.
#pragma once

#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {
namespace attention {

constexpr int kChunk = 128;    // keys
constexpr int kTileRows = 16;  // of the tensor core's instruction
constexpr float kLog2e = 1.4426950408889634f;

struct Problem {
  const void* q;
  int64_t q_stride;
  void* y;
  int64_t y_stride;
  float* sink_share;  // or null
  const float* sinks_f32;
  const bf16* sinks_bf16;
  const void* k;
  const void* v;
  const float *k_scales, *v_scales;  // of an int8 cache, else null
  const int32_t *cu_seqlens, *seq_lens, *block_table;
  const int32_t* key_starts;  // or null
  int num_sequences, max_blocks, num_blocks, block_size;
  int num_heads, num_kv_heads, group, head_dim;
  int sliding_window;  // 0: full
  int max_seq_len;
  float sm_scale;
  bool round_rows;    // queries and weights to bfloat16
  float* partial;     // sums of split attention, or null; see sink_attention_merge.cuh
  int num_rows;       // of a key/value head, over all tokens
  int max_chunks;     // of a tile
  unsigned* arrived;  // [tile][key/value head]: blocks that have left their sums
};

struct Tile {
  int sequence, first_token, first_row, num_rows;  // first_token: of the sequence, in q
  int first_position;                              // of the sequence's first new token; padding stands below 0
  int start;                                       // the place of key 0
  int low, high;                                   // keys that some row sees: [low, high)
};

__device__ __forceinline__ int first_visible(const Problem& p, int position) {
  return p.sliding_window > 0 ? max(0, position - p.sliding_window + 1) : 0;
}
// Rows past the tile's last see nothing.
__device__ __forceinline__ int position_of(const Problem& p, const Tile& tile, int row) {
  return row < tile.num_rows ? tile.first_position + (tile.first_row + row) / p.group : -1;
}

// The tile of that number, or one without rows. Sequences have ceil(new tokens * group / rows) tiles each.
__device__ inline Tile find_tile(const Problem& p, int number, int rows_per_tile) {
  Tile tile{};
  for (int s = 0; s < p.num_sequences; ++s) {
    const int begin = p.cu_seqlens[s], rows = (p.cu_seqlens[s + 1] - begin) * p.group;
    const int tiles = (rows + rows_per_tile - 1) / rows_per_tile;
    if (number >= tiles) {
      number -= tiles;
      continue;
    }
    tile.sequence = s, tile.first_token = begin, tile.first_row = number * rows_per_tile;
    tile.num_rows = min(rows_per_tile, rows - tile.first_row);
    tile.start = p.key_starts != nullptr ? max(p.key_starts[s], 0) : 0;
    const int length = min(p.seq_lens[s], min(p.max_seq_len, p.max_blocks * p.block_size - tile.start));
    tile.first_position = p.seq_lens[s] - rows / p.group;
    tile.high = min(position_of(p, tile, tile.num_rows - 1) + 1, length);
    tile.low = first_visible(p, position_of(p, tile, 0));
    return tile;
  }
  return tile;
}

__device__ __forceinline__ bool sees(const Problem& p, int position, int key) {
  return key <= position && (p.sliding_window == 0 || position - key < p.sliding_window);
}

// Where a key of the sequence lies in the caches, in rows of head_dim values, or -1 when its block is out of range.
__device__ __forceinline__ int64_t key_row(const Problem& p, const Tile& tile, int kv_head, int key) {
  const int place = tile.start + key;
  const int block = p.block_table[int64_t{tile.sequence} * p.max_blocks + place / p.block_size];
  if (block < 0 || block >= p.num_blocks) return -1;
  return (int64_t{block} * p.num_kv_heads + kv_head) * p.block_size + place % p.block_size;
}

__device__ __forceinline__ float sink_of(const Problem& p, int head) {
  return p.sinks_f32 != nullptr ? p.sinks_f32[head] : widen(p.sinks_bf16[head]);
}

// How a query with these magnitudes is rounded for an int8 cache: to whole multiples of scale, 16256 at most; see
// query_scale of the CPU's kernels. The scale is NaN when a value is not finite, which makes not_finite NaN.
struct QueryScale {
  float scale, inverse;
  __device__ __forceinline__ float code(float x) const {
    return inverse == 0.0f ? 0.0f : rintf(__fmul_rn(x, inverse));
  }
};
__device__ __forceinline__ QueryScale query_scale(float amax, float not_finite) {
  const bool usable = amax > 1e-30f && not_finite == 0.0f;
  return {__fadd_rn(amax / 16256.0f, not_finite), usable ? 16256.0f / amax : 0.0f};
}

// What a weight multiplies the codes of an int8 cache's values with; the scale of a value that is not seen may be
// anything.
__device__ __forceinline__ float scaled_weight(float weight, float v_scale) {
  return weight == 0.0f ? 0.0f : __fmul_rn(weight, v_scale);
}

// 2^(a - b) for a <= b; nothing has no weight. Scores of the tensor cores' kernels carry the factor log2(e).
__device__ __forceinline__ float weight_of(float a, float b) {
  return a == minus_infinity() ? 0.0f : ptx::exp2_approx(__fsub_rn(a, b));
}
// e^(a - b), where nothing is to be rounded: large scores times log2(e) would lose what float32 still has.
__device__ __forceinline__ float exact_weight_of(float a, float b) {
  return a == minus_infinity() ? 0.0f : expf(__fsub_rn(a, b));
}

// Running maximum (base 2) and denominator of a row, and by what the sums so far and the new ones are to be
// multiplied.
struct Running {
  float maximum, sum;
};
struct Factors {
  float old_sums, new_sums;
};
__device__ __forceinline__ Factors merge(Running& into, const Running& chunk) {
  const float maximum = fmaxf(into.maximum, chunk.maximum);
  const Factors f{weight_of(into.maximum, maximum), weight_of(chunk.maximum, maximum)};
  into.sum = __fmaf_rn(into.sum, f.old_sums, __fmul_rn(chunk.sum, f.new_sums));
  into.maximum = maximum;
  return f;
}
__device__ __forceinline__ float merged(float sums, float chunk, const Factors& f) {
  return __fmaf_rn(sums, f.old_sums, __fmul_rn(chunk, f.new_sums));
}

// What the sums are multiplied by at the end, and the sink's share.
struct Final {
  float scale, sink_share;
};
// The sign of a zero would tell of the chunks that a row's neighbours see and it does not.
__device__ __forceinline__ float scaled(float sums, const Final& final) { return __fmaf_rn(sums, final.scale, 0.0f); }
__device__ __forceinline__ Final finish(float sum, float keys, float sink) {
  const float total = __fmaf_rn(sum, keys, sink);
  if (total == 0.0f) return {0.0f, 0.0f};  // neither a key nor a sink
  return {keys / total, sink / total};
}
__device__ __forceinline__ Final add_sink(const Running& row, float sink) {
  const float logit = __fmul_rn(sink, kLog2e), maximum = fmaxf(row.maximum, logit);
  return finish(row.sum, weight_of(row.maximum, maximum), weight_of(logit, maximum));
}
__device__ __forceinline__ Final add_sink_exactly(const Running& row, float sink) {
  const float maximum = fmaxf(row.maximum, sink);
  return finish(row.sum, exact_weight_of(row.maximum, maximum), exact_weight_of(sink, maximum));
}

}  // namespace attention
}  // namespace cuda
}  // namespace mxmoe
