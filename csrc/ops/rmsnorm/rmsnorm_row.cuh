// The arithmetic of rmsnorm, for every kernel that normalises rows: all give the same bits, whatever else they do.
// A row's squares are summed in 8 parts, each by the 32 lanes of a warp in fours, and the parts in order.
#pragma once

#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {
namespace norm {

constexpr int kParts = 8;

// One part's sum, on every lane of the warp that calls this.
template <typename X>
__device__ __forceinline__ float part_of_squares(const X* row, int64_t n, bool aligned, int part) {
  float sum = 0.0f;
  const int64_t first = 4 * (part * kWarp + static_cast<int>(threadIdx.x) % kWarp);
  for (int64_t i = first; i < n; i += 4 * kParts * kWarp) {
    const float4 v = load4(row, i, n, aligned);
    sum = add_products(sum, v, v);
  }
  return warp_sum(sum);
}

// 1 / sqrt(mean + eps) of all parts.
__device__ __forceinline__ float inverse_of(const float* parts, int64_t n, float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kParts; ++i) sum = __fadd_rn(sum, parts[i]);
  return 1.0f / sqrtf(__fadd_rn(sum / static_cast<float>(n), eps));
}

__device__ __forceinline__ float4 scaled(float4 v, float inverse, float4 weight) {
  return make_float4(__fmul_rn(__fmul_rn(v.x, inverse), weight.x), __fmul_rn(__fmul_rn(v.y, inverse), weight.y),
                     __fmul_rn(__fmul_rn(v.z, inverse), weight.z), __fmul_rn(__fmul_rn(v.w, inverse), weight.w));
}

}  // namespace norm
}  // namespace cuda
}  // namespace mxmoe
