// The functions of ptx.cuh on the host, from the same sections of the PTX ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/types.h"
#include "cuda/emulation/block.h"
#include "cuda/emulation/matrix_product.h"
#include "cuda/emulation/warpgroup.h"

#define MXMOE_HOPPER 1

namespace mxmoe {
namespace ptx {

inline unsigned char* dynamic_shared() { return emulation::dynamic_shared(); }

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::async_copy(shared, global, 16, valid);
}
inline void cp_async_commit() { emulation::async_commit(); }
template <int N>
void cp_async_wait() {
  emulation::async_wait(N);
}

namespace detail {

template <bool kTransposed>
void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulation::check_shared(row, 16, "ldmatrix");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix with an address not aligned to 16 bytes");
  emulation::warp_collective(kTransposed ? "ldmatrix.x4.trans" : "ldmatrix.x4", 0xffffffffu, row, &r,
                             [](const void* const(&in)[32], void* const(&out)[32]) {
                               const auto value = [&](int matrix, int i, int j) {
                                 uint16_t bits;
                                 std::memcpy(&bits, static_cast<const unsigned char*>(in[8 * matrix + i]) + 2 * j, 2);
                                 return uint32_t{bits};
                               };
                               for (int l = 0; l < 32; ++l) {
                                 if (out[l] == nullptr) emulation::fail("ldmatrix needs all lanes of a warp");
                                 auto& to = *static_cast<uint32_t (*)[4]>(out[l]);
                                 const int g = l / 4, t = l % 4;
                                 for (int m = 0; m < 4; ++m) {
                                   to[m] = kTransposed ? value(m, 2 * t, g) | value(m, 2 * t + 1, g) << 16
                                                       : value(m, g, 2 * t) | value(m, g, 2 * t + 1) << 16;
                                 }
                               }
                             });
}

struct MmaOperands {
  uint32_t a[4], b[2];
};

inline float half_of(uint32_t pair, int which) {
  return to_float(bf16{static_cast<uint16_t>(which == 0 ? pair & 0xffffu : pair >> 16)});
}

inline void mma_bf16(const void* const (&in)[32], void* const (&out)[32]) {
  float a[16][16], b[16][8], sums[16][8];
  for (int l = 0; l < 32; ++l) {
    if (in[l] == nullptr) emulation::fail("mma.sync needs all lanes of a warp");
    const auto& own = *static_cast<const MmaOperands*>(in[l]);
    const auto& c = *static_cast<const float (*)[4]>(out[l]);
    const int g = l / 4, t = l % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * t + r / 2 * 8 + half] = half_of(own.a[r], half);
      for (int r = 0; r < 2; ++r) b[2 * t + r * 8 + half][g] = half_of(own.b[r], half);
    }
    for (int i = 0; i < 4; ++i) sums[g + i / 2 * 8][2 * t + i % 2] = c[i];
  }
  emulation::matrix_product(16, 8, 16, a[0], b[0], true, sums[0]);
  for (int l = 0; l < 32; ++l) {
    auto& c = *static_cast<float (*)[4]>(out[l]);
    for (int i = 0; i < 4; ++i) c[i] = sums[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
  }
}

}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { detail::ldmatrix_x4<false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { detail::ldmatrix_x4<true>(r, row); }

inline void mma_bf16_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const detail::MmaOperands operands{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::warp_collective("mma.sync.m16n8k16", 0xffffffffu, &operands, &c, detail::mma_bf16);
}

inline uint32_t pack_bf16(float low, float high) {
  const auto convert = [](float x) { return std::isnan(x) ? uint32_t{0x7fff} : uint32_t{to_bf16(x).bits}; };
  return convert(low) | convert(high) << 16;
}

inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(detail::half_of(a, 0) * detail::half_of(b, 0), detail::half_of(a, 1) * detail::half_of(b, 1));
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // subnormal results are flushed
}

inline uint4 load_once_16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
    emulation::fail("ld.global.v4 with an address not aligned to 16 bytes");
  return *static_cast<const uint4*>(p);
}

inline uint64_t matrix_descriptor(const void* tile, uint32_t stride, uint32_t leading = 16) {
  const uint32_t address = emulation::shared_address(tile);
  return uint64_t{(address & 0x3ffffu) >> 4} | uint64_t{(leading & 0x3ffffu) >> 4} << 16 |
         uint64_t{(stride & 0x3ffffu) >> 4} << 32 | uint64_t{1} << 62;
}
inline void fence_proxy_async() { emulation::fence_proxy_async(); }
inline void wgmma_fence() { emulation::wgmma_fence(); }
inline void wgmma_commit() { emulation::wgmma_commit(); }
template <int N>
void wgmma_wait() {
  emulation::wgmma_wait(N);
}
template <int kCount>
void wgmma_hold(float (&)[kCount]) {}
template <int N>
constexpr bool kIsWgmmaWidth = N % 8 == 0 && N >= 8 && N <= 256;
template <int N, bool kTransposedB = false>
void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kIsWgmmaWidth<N>, "wgmma has no such N");
  emulation::wgmma({d, a, 0, b, false, kTransposedB, accumulate, N});
}
template <int N, bool kTransposedA = false, bool kTransposedB = false>
void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kIsWgmmaWidth<N>, "wgmma has no such N");
  emulation::wgmma({d, nullptr, a, b, kTransposedA, kTransposedB, accumulate, N});
}

inline void phase_init(uint64_t* barrier, unsigned count) { emulation::phase_init(barrier, count); }
inline void phase_arrive(uint64_t* barrier) { emulation::phase_arrive(barrier); }
inline void phase_wait(uint64_t* barrier, unsigned parity) { emulation::phase_wait(barrier, parity); }

inline void wait_for_previous_kernel() {}
inline void release_next_kernel() {}

}  // namespace ptx
}  // namespace mxmoe
