// Which pairs of (token, choice) go through which expert: sorted by expert, stably, and cut into tiles of one expert
// each; and the sum over a token's choices at the end.
#pragma once

#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {
namespace moe {

constexpr int kGroupThreads = 1024;
constexpr int kMaxExperts = kGroupThreads;  // held here: a thread an expert

struct Groups {
  const int32_t* ids;  // (num_pairs)
  int num_pairs, experts_per_token, first_expert, num_experts;
  int32_t* order;        // (num_pairs): pairs by expert; an expert held elsewhere has none
  int32_t* place;        // (num_pairs): where each pair stands in that order, or -1
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

// One block.
__global__ void __launch_bounds__(kGroupThreads) mxfp4_moe_group_sm80_kernel(Groups s) {
  int* begins = reinterpret_cast<int*>(ptx::dynamic_shared());  // counts first; then where experts' pairs begin
  int* tiles = begins + kMaxExperts + 1;                        // and their tiles
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  constexpr int kWarps = kGroupThreads / kWarp;
  ptx::wait_for_previous_kernel();
  for (int pair = thread; pair < s.num_pairs; pair += kGroupThreads) s.place[pair] = -1;
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
    for_pairs(s, e, [&](int pair, int rank) { s.order[begin + rank] = pair, s.place[pair] = begin + rank; });
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
  const float* rows;     // by place
  const int32_t* place;  // (num_tokens, experts_per_token)
  const float* weights;  // likewise
  const float* residual;
  int64_t residual_stride;
  float* y;
  int64_t y_stride;
  int experts_per_token, hidden_size;
};

constexpr int kCombineThreads = 256;

// grid: (token, part of the hidden size). Choices in their order.
__global__ void __launch_bounds__(kCombineThreads) mxfp4_moe_combine_sm80_kernel(Combine c) {
  const int64_t token = blockIdx.x;
  const int i = static_cast<int>(blockIdx.y) * kCombineThreads + static_cast<int>(threadIdx.x);
  if (i >= c.hidden_size) return;
  ptx::wait_for_previous_kernel();
  float sum = c.residual != nullptr ? c.residual[token * c.residual_stride + i] : 0.0f;
  for (int choice = 0; choice < c.experts_per_token; ++choice) {
    const int64_t pair = token * c.experts_per_token + choice;
    const int place = c.place[pair];
    if (place >= 0) sum = __fmaf_rn(c.weights[pair], c.rows[int64_t{place} * c.hidden_size + i], sum);
  }
  c.y[token * c.y_stride + i] = sum;
}

}  // namespace moe
}  // namespace cuda
}  // namespace mxmoe
