// Attention for what the tensor cores do not take: float32 caches, nothing rounded, any head_dim. A warp a row. Lanes
// take 32 keys at once, then, for each key that is seen, the values.
#pragma once

#include <type_traits>

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

// A row's query in shared memory, as it meets the cache.
template <typename Q, typename KV>
__device__ __forceinline__ void stage_query(const Problem& p, const Q* q, float* query) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (!p.round_rows || !std::is_same<KV, int8_t>::value) {
    for (int i = lane; i < p.head_dim; i += kWarp) query[i] = rounded(p, widen(q[i]));
    return __syncwarp();
  }
  float largest = 0.0f, not_finite = 0.0f;
  for (int i = lane; i < p.head_dim; i += kWarp) {
    const float x = widen(q[i]);
    largest = fmaxf(largest, fabsf(x)), not_finite = __fadd_rn(not_finite, __fmul_rn(x, 0.0f));
  }
  const QueryScale scale = query_scale(warp_max(largest), warp_sum(not_finite));
  for (int i = lane; i < p.head_dim; i += kWarp) query[i] = __fmul_rn(scale.code(widen(q[i])), scale.scale);
  __syncwarp();
}

// grid: (group of tiles of one row, key/value head).
template <typename Q, typename KV, typename Y>
__global__ void __launch_bounds__(kSimtThreads) sink_attention_simt_sm80_kernel(Problem p) {
  constexpr bool kInt8 = std::is_same<KV, int8_t>::value;
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
  stage_query<Q, KV>(p, q, query);

  Running total{minus_infinity(), 0.0f};
  float values[kMaxValues] = {};
  for (int first = tile.low / kWarp * kWarp; first < tile.high; first += kWarp) {
    const int key = first + lane;
    int64_t row = -1;
    if (key >= tile.low && key < tile.high && sees(p, position, key)) row = key_row(p, tile, kv_head, key);
    float score = minus_infinity();
    if (row >= 0) {
      score = dot(query, static_cast<const KV*>(p.k) + row * p.head_dim, p.head_dim) * p.sm_scale;
      if (kInt8) score = __fmul_rn(score, p.k_scales[row]);
    }
    const float maximum = fmaxf(total.maximum, warp_max(score));
    const float shrink = exact_weight_of(total.maximum, maximum);
    float weight = exact_weight_of(score, maximum);
    if (!kInt8) weight = rounded(p, weight);
    total.maximum = maximum, total.sum = total.sum * shrink + warp_sum(weight);
    if (kInt8) weight = rounded(p, row >= 0 ? scaled_weight(weight, p.v_scales[row]) : 0.0f);
    float step[kMaxValues] = {};  // summed on its own, for the same reason
    const unsigned seen = __ballot_sync(kAllLanes, row >= 0);
    for (int j = 0; j < kWarp; ++j) {
      if ((seen >> j & 1u) == 0) continue;  // its value may be anything
      const float w = __shfl_sync(kAllLanes, weight, j);
      const KV* v = static_cast<const KV*>(p.v) + __shfl_sync(kAllLanes, row, j) * p.head_dim;
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
