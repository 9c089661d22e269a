// The vector vocabulary for AVX-512 without VNNI and BF16.
#pragma once

#include <immintrin.h>

#include "core/types.h"

#define MXMOE_SIMD avx512

#include "core/target_avx512.h"
namespace mxmoe {
namespace avx512 {
#include "simd/avx512_words.inl"

struct A8 {
  __m512i x;  // int16
};
using W8 = A8;
struct F8 {
  __m512 v;
};
inline F8 zero_f8() { return {_mm512_setzero_ps()}; }
template <int Offset>
inline A8 load_a8(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline W8 load_w8(const int8_t* p) { return load_a8<0>(p); }
inline W8 decode_w8(const uint8_t* p) {
  const __m128i doubled = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  return {_mm512_cvtepi8_epi16(e2m1_bytes(p, doubled))};
}
inline void mac8(F8& acc, const A8& a, const W8& w, float scale) {
  acc.v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_madd_epi16(a.x, w.x)), _mm512_set1_ps(scale), acc.v);
}
inline float finish(const F8& acc) { return reduce_add(f32v{acc.v}); }
}  // namespace avx512
}  // namespace mxmoe
#include "core/target_end.h"
