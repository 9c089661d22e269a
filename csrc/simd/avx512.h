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

// --- bytes of a panel, for simd/panels_bytes.inl ---

using words = __m512i;
inline words load_words(const char* p) { return _mm512_loadu_si512(p); }
inline words broadcast_word(const char* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return _mm512_set1_epi32(x);
}
inline words words_of_16(int16_t x) { return _mm512_set1_epi16(x); }
inline words words_of_32(int32_t x) { return _mm512_set1_epi32(x); }
inline words shift_right_4(words x) { return _mm512_srli_epi16(x, 4); }
// Doubled values of the codes in the low nibbles, raised by 12.
inline words raised_e2m1(words codes) {
  const words table =
      _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
}
inline words even_bytes(words x) { return _mm512_and_si512(x, _mm512_set1_epi16(255)); }
inline words odd_bytes(words x) { return _mm512_srli_epi16(x, 8); }
// Sums of two neighbouring products: of unsigned with signed bytes, which must fit 16 bits; of 16-bit numbers.
inline words multiply_bytes(words u, words s) { return _mm512_maddubs_epi16(u, s); }
inline words multiply_16(words a, words b) { return _mm512_madd_epi16(a, b); }
inline words add_16(words a, words b) { return _mm512_add_epi16(a, b); }
inline words add_32(words a, words b) { return _mm512_add_epi32(a, b); }
inline f32v to_floats(words x) { return {_mm512_cvtepi32_ps(x)}; }
// 2^(byte - 127) for every lane. 2^-127 is subnormal in float32.
inline f32v e8m0_scales(const uint8_t* p) {
  const words exponents =
      _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 23);
  return {_mm512_castsi512_ps(_mm512_max_epi32(exponents, _mm512_set1_epi32(0x00400000)))};
}
}  // namespace avx512
}  // namespace mxmoe
#include "core/target_end.h"
