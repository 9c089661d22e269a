// The vector vocabulary for AVX-512 with VNNI and BF16 dot products.
#pragma once

#include <immintrin.h>

#include "core/types.h"

#define MXMOE_SIMD avx512x
#define MXMOE_SIMD_DOT 1  // vpdpbusd and vdpbf16ps are at hand

#include "core/target_avx512x.h"
namespace mxmoe {
namespace avx512x {
#include "simd/avx512_words.inl"

// vpdpbusd multiplies unsigned by signed bytes: weights are raised by Offset to be unsigned, and every lane
// starts at -Offset * sum(its activations), which takes the raise off again, exactly and before any rounding.
struct A8 {
  __m256i x;
  __m256i start;
};
struct W8 {
  __m256i x;
};
struct F8 {
  __m256 v;
};
inline F8 zero_f8() { return {_mm256_setzero_ps()}; }
template <int Offset>
inline A8 load_a8(const int8_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i raise = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(static_cast<char>(Offset)), x);
  return {x, _mm256_sub_epi32(_mm256_setzero_si256(), raise)};
}
inline W8 load_w8(const int8_t* p) {  // raised by 128
  return {_mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi8(-128))};
}
inline W8 decode_w8(const uint8_t* p) {  // raised by 12
  return {e2m1_bytes(p, _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0))};
}
inline void mac8(F8& acc, const A8& a, const W8& w, float scale) {
  const __m256i dot = _mm256_dpbusd_epi32(a.start, w.x, a.x);
  acc.v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale), acc.v);
}
inline float finish(const F8& acc) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(acc.v), _mm256_extractf128_ps(acc.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}
}  // namespace avx512x
}  // namespace mxmoe
#include "core/target_end.h"
