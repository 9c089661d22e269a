// Which pairs of (token, choice) go through which expert, and the sum over a token's choices at the end.
//
// Many pairs are sorted by expert beforehand, stably, and cut into tiles of one expert each. Of few pairs each block
// finds its expert's by itself, among all ids. Results lie by pair.
#pragma once

#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {
namespace moe {

constexpr int kGroupThreads = 1024;
constexpr int kMaxExperts = kGroupThreads;  // held here: a thread an expert
constexpr int kFewPairs = 512;              // that every block can look through

struct Groups {
  const int32_t* ids;  // (num_pairs)
  int num_pairs, experts_per_token, first_expert, num_experts;
  int32_t* order;        // (num_pairs): pairs by expert, without those of experts held elsewhere; null: few pairs
  int32_t* tile_expert;  // (max_tiles), -1 past the last
  int32_t* tile_begin;   // in order
  int32_t* tile_end;
  int max_tiles, tile_pairs;
};

// Calls visit(pair, rank) on one lane for each of the expert's pairs, in order; returns how many there are. For a
// warp.
template <typename Visit>
__device__ __forceinline__ int for_pairs(const Groups& s, int expert, const Visit& visit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int count = 0;
  for (int first = 0; first < s.num_pairs; first += kWarp) {
    const int pair = first + lane;
    const bool own = pair < s.num_pairs && int64_t{s.ids[pair]} == int64_t{s.first_expert} + expert;
    const unsigned owners = __ballot_sync(kAllLanes, own);
    if (own) visit(pair, count + __popc(owners & ((1u << lane) - 1u)));
    count += __popc(owners);
  }
  return count;
}

// What a block multiplies: rows of one expert by some of its pairs. None: the block has nothing to do.
struct BlockPairs {
  int expert, count;
  const int32_t* pairs;
};

// Of few pairs, axis y goes through experts, or through pairs when these are fewer: the expert's first one stands for
// all. Every thread calls it; `list` is shared memory for kFewPairs, to be read after a barrier.
__device__ __forceinline__ BlockPairs pairs_of_block(const Groups& s, int32_t* list) {
  const int y = static_cast<int>(blockIdx.y);
  if (s.order != nullptr) {
    const int expert = s.tile_expert[y], begin = expert < 0 ? 0 : s.tile_begin[y];
    return {expert, expert < 0 ? 0 : s.tile_end[y] - begin, s.order + begin};
  }
  const int64_t expert = s.num_pairs > s.num_experts ? y : int64_t{s.ids[y]} - s.first_expert;
  if (expert < 0 || expert >= s.num_experts) return {-1, 0, list};
  int before = y;
  const int count = for_pairs(s, static_cast<int>(expert), [&](int pair, int rank) {
    if (threadIdx.x < kWarp) list[rank] = pair;
    if (rank == 0) before = pair;
  });
  // Lane l of each warp has the first pair for l = pair % 32 alone: it is the block's own, or the block stands back.
  const bool other = s.num_pairs <= s.num_experts && __any_sync(kAllLanes, before != y);
  return {static_cast<int>(expert), other ? 0 : count, list};
}

// Axis y of a launch over few pairs.
inline int few_blocks(const Groups& s) { return s.num_pairs < s.num_experts ? s.num_pairs : s.num_experts; }

// One block.
__global__ void __launch_bounds__(kGroupThreads) mxfp4_moe_group_sm80_kernel(Groups s) {
  int* begins = reinterpret_cast<int*>(ptx::dynamic_shared());  // counts first; then where experts' pairs begin
  int* tiles = begins + kMaxExperts + 1;                        // and their tiles
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  constexpr int kWarps = kGroupThreads / kWarp;
  ptx::wait_for_previous_kernel();
  for (int e = warp; e < s.num_experts; e += kWarps) {
    const int count = for_pairs(s, e, [](int, int) {});
    if (lane == 0) begins[e] = count;
  }
  __syncthreads();
  if (thread == 0) {
    int pairs = 0, all_tiles = 0;
    for (int e = 0; e < s.num_experts; ++e) {
      const int count = begins[e];
      begins[e] = pairs, tiles[e] = all_tiles;
      pairs += count, all_tiles += (count + s.tile_pairs - 1) / s.tile_pairs;
    }
    begins[s.num_experts] = pairs, tiles[s.num_experts] = all_tiles;
  }
  __syncthreads();
  for (int e = warp; e < s.num_experts; e += kWarps) {
    const int begin = begins[e];
    for_pairs(s, e, [&](int pair, int rank) { s.order[begin + rank] = pair; });
  }
  if (thread < s.num_experts) {
    for (int i = tiles[thread]; i < tiles[thread + 1]; ++i) {
      const int begin = begins[thread] + (i - tiles[thread]) * s.tile_pairs;
      s.tile_expert[i] = thread;
      s.tile_begin[i] = begin, s.tile_end[i] = min(begin + s.tile_pairs, begins[thread + 1]);
    }
  }
  for (int i = tiles[s.num_experts] + thread; i < s.max_tiles; i += kGroupThreads) s.tile_expert[i] = -1;
}

struct Combine {
  const float* rows;     // (num_pairs, hidden_size)
  const float* weights;  // (num_pairs)
  const float* residual;
  int64_t residual_stride;
  float* y;
  int64_t y_stride;
  int num_tokens, hidden_size;
  unsigned* arrived;  // blocks, by axis x; zeros, and left so
};

constexpr int kCombineThreads = 256;

// Choices in their order. Rows may come from other blocks of the same kernel: not by way of the first-level cache.
__device__ __forceinline__ void combine_element(const Combine& c, const Groups& s, int64_t token, int i) {
  float sum = c.residual != nullptr ? c.residual[token * c.residual_stride + i] : 0.0f;
  for (int choice = 0; choice < s.experts_per_token; ++choice) {
    const int64_t pair = token * s.experts_per_token + choice;
    const int64_t expert = int64_t{s.ids[pair]} - s.first_expert;
    if (expert < 0 || expert >= s.num_experts) continue;
    sum = __fmaf_rn(c.weights[pair], __ldcg(c.rows + pair * c.hidden_size + i), sum);
  }
  c.y[token * c.y_stride + i] = sum;
}

// grid: (token, part of the hidden size).
__global__ void __launch_bounds__(kCombineThreads) mxfp4_moe_combine_sm80_kernel(Combine c, Groups s) {
  const int i = static_cast<int>(blockIdx.y) * kCombineThreads + static_cast<int>(threadIdx.x);
  if (i >= c.hidden_size) return;
  ptx::wait_for_previous_kernel();
  combine_element(c, s, blockIdx.x, i);
}

// The last of the blocks that share axis x sums choices for all tokens, columns [begin, end). Every thread calls it,
// when it has written its rows; `flag` is shared memory.
__device__ __forceinline__ void combine_last(const Combine& c, const Groups& s, int begin, int end, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(c.arrived + blockIdx.x, 1u) == gridDim.y - 1 ? 1 : 0;
  __syncthreads();
  if (*flag == 0) return;
  __threadfence();
  if (threadIdx.x == 0) c.arrived[blockIdx.x] = 0;
  const int columns = min(end, c.hidden_size) - begin;
  for (int i = static_cast<int>(threadIdx.x); i < c.num_tokens * columns; i += static_cast<int>(blockDim.x)) {
    combine_element(c, s, i / columns, begin + i % columns);
  }
}

}  // namespace moe
}  // namespace cuda
}  // namespace mxmoe
