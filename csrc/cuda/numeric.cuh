// Small arithmetic that kernels share: conversions, vector loads of any row, reductions in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/types.h"
#include "cuda/ptx.cuh"

namespace mxmoe {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(int8_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float widen_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float widen_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return bf16{static_cast<uint16_t>(ptx::pack_bf16(x, 0.0f) & 0xffffu)};
}

__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fc00000u); }
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// Four neighbours of a row of n, zeros past its end; one access when the row is `aligned` for it. The values are the
// same either way.
__device__ __forceinline__ float4 load4(const float* row, int64_t i, int64_t n, bool aligned) {
  if (aligned && i + 4 <= n) return *reinterpret_cast<const float4*>(row + i);
  return make_float4(i < n ? row[i] : 0.0f, i + 1 < n ? row[i + 1] : 0.0f, i + 2 < n ? row[i + 2] : 0.0f,
                     i + 3 < n ? row[i + 3] : 0.0f);
}
__device__ __forceinline__ float4 load4(const bf16* row, int64_t i, int64_t n, bool aligned) {
  if (aligned && i + 4 <= n) {
    const uint2 v = *reinterpret_cast<const uint2*>(row + i);
    return make_float4(widen_low(v.x), widen_high(v.x), widen_low(v.y), widen_high(v.y));
  }
  return make_float4(i < n ? widen(row[i]) : 0.0f, i + 1 < n ? widen(row[i + 1]) : 0.0f,
                     i + 2 < n ? widen(row[i + 2]) : 0.0f, i + 3 < n ? widen(row[i + 3]) : 0.0f);
}
__device__ __forceinline__ void store4(float* row, int64_t i, int64_t n, bool aligned, float4 v) {
  if (aligned && i + 4 <= n) {
    *reinterpret_cast<float4*>(row + i) = v;
    return;
  }
  if (i < n) row[i] = v.x;
  if (i + 1 < n) row[i + 1] = v.y;
  if (i + 2 < n) row[i + 2] = v.z;
  if (i + 3 < n) row[i + 3] = v.w;
}
__device__ __forceinline__ void store4(bf16* row, int64_t i, int64_t n, bool aligned, float4 v) {
  if (aligned && i + 4 <= n) {
    *reinterpret_cast<uint2*>(row + i) = make_uint2(ptx::pack_bf16(v.x, v.y), ptx::pack_bf16(v.z, v.w));
    return;
  }
  if (i < n) row[i] = narrow<bf16>(v.x);
  if (i + 1 < n) row[i + 1] = narrow<bf16>(v.y);
  if (i + 2 < n) row[i + 2] = narrow<bf16>(v.z);
  if (i + 3 < n) row[i + 3] = narrow<bf16>(v.w);
}
template <typename T>
__device__ __forceinline__ bool aligned_to(const T* p, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// sum + a . b, in one order and spelled with intrinsics: kernels that must give the same bits add up by this alone,
// since a compiler may contract what is written with operators here and not there.
__device__ __forceinline__ float add_products(float sum, float4 a, float4 b) {
  return __fadd_rn(sum,
                   __fadd_rn(__fmaf_rn(a.x, b.x, __fmul_rn(a.y, b.y)), __fmaf_rn(a.z, b.z, __fmul_rn(a.w, b.w))));
}

// The same tree on every lane, so that all hold the same bits.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Sum over a block of kThreads; `partial` is shared memory for kThreads / 32 floats, free again after the next
// barrier. Every thread gets the sum.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x, float* partial) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) sum += partial[w];
  return sum;
}

}  // namespace cuda
}  // namespace mxmoe
