// Attention for what the tensor cores do not take: float32 caches, nothing rounded, any head_dim. A warp a row. Lanes
// take 32 keys at once, then, for each key that is seen, the values.
#pragma once

#include "ops/sink_attention/sink_attention_rows.cuh"

namespace mxmoe {
namespace cuda {
namespace attention {

constexpr int kSimtWarps = 4;
constexpr int kSimtThreads = kSimtWarps * kWarp;
constexpr int kMaxValues = 256 / kWarp;  // of a lane, at the largest head_dim

// Four sums side by side round less than one long one.
template <typename KV>
__device__ __forceinline__ float dot(const float* q, const KV* k, int n) {
  float sums[4] = {};
  int i = 0;
  for (; i + 4 <= n; i += 4) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = __fmaf_rn(q[i + j], widen(k[i + j]), sums[j]);
  }
  for (; i < n; ++i) sums[0] = __fmaf_rn(q[i], widen(k[i]), sums[0]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

__device__ __forceinline__ float rounded(const Problem& p, float x) {
  return p.round_rows ? widen(narrow<bf16>(x)) : x;
}

// grid: (group of tiles of one row, key/value head).
template <typename Q, typename KV, typename Y>
__global__ void __launch_bounds__(kSimtThreads) sink_attention_simt_sm80_kernel(Problem p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  float* query = reinterpret_cast<float*>(ptx::dynamic_shared()) + warp * p.head_dim;
  const int kv_head = static_cast<int>(blockIdx.y);
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  const Tile tile = find_tile(p, static_cast<int>(blockIdx.x) * kSimtWarps + warp, 1);
  if (tile.num_rows == 0) return;
  const int head = kv_head * p.group + tile.first_row % p.group, position = position_of(p, tile, 0);
  const int64_t token = int64_t{tile.first_token} + tile.first_row / p.group;
  const Q* q = static_cast<const Q*>(p.q) + token * p.q_stride + int64_t{head} * p.head_dim;
  for (int i = lane; i < p.head_dim; i += kWarp) query[i] = rounded(p, widen(q[i]));
  __syncwarp();

  Running total{minus_infinity(), 0.0f};
  float values[kMaxValues] = {};
  for (int first = tile.low / kWarp * kWarp; first < tile.high; first += kWarp) {
    const int key = first + lane;
    int64_t offset = -1;
    if (key >= tile.low && key < tile.high && sees(p, position, key)) offset = key_offset(p, tile, kv_head, key);
    float score = minus_infinity();
    if (offset >= 0) {
      score = dot(query, static_cast<const KV*>(p.k) + offset, p.head_dim) * p.sm_scale;
    }
    const float maximum = fmaxf(total.maximum, warp_max(score));
    const float shrink = exact_weight_of(total.maximum, maximum);
    const float weight = rounded(p, exact_weight_of(score, maximum));
    total.maximum = maximum, total.sum = total.sum * shrink + warp_sum(weight);
    float step[kMaxValues] = {};  // summed on its own, for the same reason
    const unsigned seen = __ballot_sync(kAllLanes, offset >= 0);
    for (int j = 0; j < kWarp; ++j) {
      if ((seen >> j & 1u) == 0) continue;  // its value may be anything
      const float w = __shfl_sync(kAllLanes, weight, j);
      const KV* v = static_cast<const KV*>(p.v) + __shfl_sync(kAllLanes, offset, j);
#pragma unroll
      for (int i = 0; i < kMaxValues; ++i) {
        const int d = i * kWarp + lane;
        if (d < p.head_dim) step[i] = __fmaf_rn(w, widen(v[d]), step[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kMaxValues; ++i) values[i] = __fmaf_rn(values[i], shrink, step[i]);
  }
  const Final final = add_sink_exactly(total, sink_of(p, head));
  Y* y = static_cast<Y*>(p.y) + token * p.y_stride + int64_t{head} * p.head_dim;
#pragma unroll
  for (int i = 0; i < kMaxValues; ++i) {
    const int d = i * kWarp + lane;
    if (d < p.head_dim) y[d] = narrow<Y>(values[i] * final.scale);
  }
  if (lane == 0 && p.sink_share != nullptr) p.sink_share[token * p.num_heads + head] = final.sink_share;
}

}  // namespace attention
}  // namespace cuda
}  // namespace mxmoe
