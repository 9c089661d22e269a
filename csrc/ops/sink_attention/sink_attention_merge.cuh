// Partial sums of split attention: where a row's chunks stand in memory, and how the block that is done last for a
// tile and a key/value head merges them. Chunks meet in order, but their maxima are maxima of all before in whatever
// order they are taken, and with these every factor is known: only multiply-adds follow each other.
#pragma once

#include "ops/sink_attention/sink_attention_rows.cuh"

namespace mxmoe {
namespace cuda {
namespace attention {

constexpr int kMergeThreads = 128;
constexpr int kMergeChunks = 16;  // of a lane: whose factors it computes, and whose values it has asked for
// A table of factors for so many chunks and rows as there are lanes to compute them, one entry of 16 between lanes so
// that they meet different banks; and a word.
constexpr size_t kFactorBytes = size_t{kMergeThreads} * (kMergeChunks + 1) * sizeof(float4);
constexpr size_t kMergeBytes = kFactorBytes + 16;

// Row `row` of a tile, numbered over the whole call, has max_chunks chunks in a row: values, and behind all values
// the maxima and denominators.
__device__ __forceinline__ int64_t partial_at(const Problem& p, const Tile& tile, int kv_head, int row) {
  const int64_t of_call = int64_t{tile.first_token} * p.group + tile.first_row + row;
  return (int64_t{kv_head} * p.num_rows + of_call) * p.max_chunks;
}
__device__ __forceinline__ float* partial_values(const Problem& p, int64_t at) { return p.partial + at * p.head_dim; }
__device__ __forceinline__ float2* partial_row(const Problem& p, int64_t at) {
  float* behind = p.partial + int64_t{p.num_kv_heads} * p.num_rows * p.max_chunks * p.head_dim;
  return reinterpret_cast<float2*>(behind) + at;
}
// Floats that a row's sums of one chunk take.
constexpr int kPartialTail = 2;

// The chunks that a tile sees, from its first one on.
__device__ __forceinline__ int chunks_of(const Tile& tile) {
  return max(0, (tile.high + kChunk - 1) / kChunk - tile.low / kChunk);
}

// Whether this block is the last one of `blocks` that have left their sums for a tile and head. Every thread learns
// it through `word` in shared memory.
__device__ __forceinline__ bool is_last_block(unsigned* arrived, int blocks, int* word) {
  if (blocks == 1) {
    __syncthreads();
    return true;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *word = atomicAdd(arrived, 1u) == static_cast<unsigned>(blocks) - 1u;
    if (*word) *arrived = 0;  // as the next launch wants it
  }
  __syncthreads();
  if (!*word) return false;
  __threadfence();
  return true;
}

// The factors of up to kLanes * kMergeChunks chunks of a row by the kLanes lanes that hold it: of the sums before, of
// the chunk's, and the chunk's denominator times that. Takes and returns the maximum of all chunks before.
template <int kLanes>
__device__ __forceinline__ float write_factors(const float2* of_chunks, int count, float before, float4* table) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  float2 own[kMergeChunks];
  float largest = minus_infinity();
#pragma unroll
  for (int i = 0; i < kMergeChunks; ++i) {
    const int chunk = lane * kMergeChunks + i;
    own[i] = chunk < count ? __ldcg(of_chunks + chunk) : make_float2(minus_infinity(), 0.0f);
    largest = fmaxf(largest, own[i].x);
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const float other = __shfl_up_sync(kAllLanes, largest, step);
    if (lane >= step) largest = fmaxf(largest, other);
  }
  const float previous = __shfl_up_sync(kAllLanes, largest, 1);
  Running upto{lane == 0 ? before : fmaxf(before, previous), 0.0f};
#pragma unroll
  for (int i = 0; i < kMergeChunks; ++i) {
    const Factors f = merge(upto, {own[i].x, own[i].y});
    table[lane * (kMergeChunks + 1) + i] = make_float4(f.old_sums, f.new_sums, __fmul_rn(own[i].y, f.new_sums), 0.0f);
  }
  return fmaxf(before, __shfl_sync(kAllLanes, largest, kLanes - 1, kLanes));
}

// A row's result and its sink's share: four values a lane from `first_value` on.
template <typename Y>
__device__ __forceinline__ void write_merged(const Problem& p, const Tile& tile, int kv_head, int row,
                                             int first_value, const Running& total, const float (&values)[4]) {
  const int of_sequence = tile.first_row + row, head = kv_head * p.group + of_sequence % p.group;
  const int64_t token = int64_t{tile.first_token} + of_sequence / p.group;
  const Final final = add_sink(total, sink_of(p, head));
  Y* y = static_cast<Y*>(p.y) + token * p.y_stride + head * p.head_dim + first_value;
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = narrow<Y>(scaled(values[i], final));
  if (first_value == 0 && p.sink_share != nullptr) p.sink_share[token * p.num_heads + head] = final.sink_share;
}

// kDim / 4 lanes a row, four values each. `table` is shared memory of kFactorBytes that nobody uses any more.
template <int kDim, typename Y>
__device__ __forceinline__ void merge_rows(const Problem& p, const Tile& tile, int kv_head, float4* table) {
  constexpr int kLanes = kDim / 4, kRows = kMergeThreads / kLanes, kPiece = kLanes * kMergeChunks;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, slot = static_cast<int>(threadIdx.x) / kLanes;
  const int chunks = chunks_of(tile);
  table += slot * kLanes * (kMergeChunks + 1);
  for (int first_row = 0; first_row < tile.num_rows; first_row += kRows) {
    const int row = min(first_row + slot, tile.num_rows - 1);  // past the last one that again: lanes stay together
    const int64_t at = partial_at(p, tile, kv_head, row);
    const float4* of_lane = reinterpret_cast<const float4*>(partial_values(p, at)) + lane;
    const float2* of_chunks = partial_row(p, at);
    float4 ahead[kMergeChunks];
#pragma unroll
    for (int i = 0; i < kMergeChunks; ++i) {
      if (i < chunks) ahead[i] = __ldcg(of_lane + i * kLanes);
    }
    Running total{minus_infinity(), 0.0f};
    float values[4] = {};
    for (int piece = 0; piece < chunks; piece += kPiece) {
      const int end = min(chunks, piece + kPiece);
      total.maximum = write_factors<kLanes>(of_chunks + piece, end - piece, total.maximum, table);
      __syncwarp();
      const float4* factors = table;
      for (int first = piece; first < end; first += kMergeChunks, factors += kMergeChunks + 1) {
#pragma unroll
        for (int i = 0; i < kMergeChunks; ++i) {
          const int chunk = first + i;
          if (chunk >= end) continue;
          const float4 v = ahead[i], f = factors[i];
          const int later = chunk + kMergeChunks;
          if (later < chunks) ahead[i] = __ldcg(of_lane + int64_t{later} * kLanes);
          const Factors both{f.x, f.y};
          values[0] = merged(values[0], v.x, both), values[1] = merged(values[1], v.y, both);
          values[2] = merged(values[2], v.z, both), values[3] = merged(values[3], v.w, both);
          total.sum = __fmaf_rn(total.sum, f.x, f.z);
        }
      }
      __syncwarp();  // all have read what is overwritten next
    }
    if (first_row + slot < tile.num_rows) write_merged<Y>(p, tile, kv_head, row, 4 * lane, total, values);
  }
}

}  // namespace attention
}  // namespace cuda
}  // namespace mxmoe
