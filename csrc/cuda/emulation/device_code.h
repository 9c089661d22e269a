// The device language on the host: qualifiers vanish, built-in variables and functions are what they are for the
// thread (fiber) that runs at the moment.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "cuda/emulation/block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __grid_constant__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using mxmoe::emulation::dim3;
using mxmoe::emulation::uint3;
// Set whenever a thread is switched to.
inline uint3& threadIdx = mxmoe::emulation::thread_index;
inline uint3& blockIdx = mxmoe::emulation::block_index;
inline dim3& blockDim = mxmoe::emulation::block_size;
inline dim3& gridDim = mxmoe::emulation::grid_size;
constexpr int warpSize = 32;

inline void __syncthreads() { mxmoe::emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { mxmoe::emulation::warp_barrier(mask); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = mxmoe::emulation::lane(), base = lane / width * width;
  return mxmoe::emulation::shuffle("__shfl_sync", mask, value, base + (from & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return mxmoe::emulation::shuffle("__shfl_xor_sync", mask, value, mxmoe::emulation::lane() ^ other);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  const int from = mxmoe::emulation::lane() + by;
  return mxmoe::emulation::shuffle("__shfl_down_sync", mask, value, from < 32 ? from : mxmoe::emulation::lane());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  const int from = mxmoe::emulation::lane() - by;
  return mxmoe::emulation::shuffle("__shfl_up_sync", mask, value, from >= 0 ? from : mxmoe::emulation::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return mxmoe::emulation::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Threads run one at a time.
template <typename T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
T __ldcg(const T* p) {
  return *p;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// Four of the eight bytes of y and x, picked by the lower three bits of the selector's nibbles.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  }
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
using std::isinf;
using std::isnan;
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
