// The vector vocabulary for AVX-512 without VNNI and BF16.
#pragma once

#include <immintrin.h>

#include "core/fetch.h"
#include "core/types.h"

#define MXMOE_SIMD avx512

#include "core/target_avx512.h"
namespace mxmoe {
namespace avx512 {
#include "simd/avx512_words.inl"

// --- dwords of a panel, for simd/panels*.inl ---

using words = __m512i;
inline words load_words(const char* p) { return _mm512_loadu_si512(p); }
inline void store_words(char* p, words x) { _mm512_storeu_si512(p, x); }
inline words words_of_floats(f32v x) { return _mm512_castps_si512(x.v); }  // the bits
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
// Plus the sums of two neighbouring products of 16-bit numbers.
inline words add_dot_16(words sum, words a, words b) {
  sum = add_32(sum, multiply_16(a, b));
  __asm__("" : "+v"(sum));  // GCC would add up many products first, and run out of registers
  return sum;
}
inline f32v to_floats(words x) { return {_mm512_cvtepi32_ps(x)}; }
// 2^(byte - 127) for every lane. 2^-127 is subnormal in float32.
inline f32v e8m0_scales(const uint8_t* p) {
  const words exponents =
      _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 23);
  return {_mm512_castsi512_ps(_mm512_max_epi32(exponents, _mm512_set1_epi32(0x00400000)))};
}
// As in core/packed.h, of every dword.
inline words gather_nibbles(words x) {
  x = _mm512_and_si512(x, _mm512_set1_epi32(0x0f0f0f0f));
  x = _mm512_and_si512(_mm512_or_si512(x, _mm512_srli_epi32(x, 4)), _mm512_set1_epi32(0x00ff00ff));
  return _mm512_and_si512(_mm512_or_si512(x, _mm512_srli_epi32(x, 8)), _mm512_set1_epi32(0xffff));
}
inline words pack_words(words codes) {
  return _mm512_or_si512(gather_nibbles(codes), _mm512_slli_epi32(gather_nibbles(_mm512_srli_epi32(codes, 4)), 16));
}
inline words flip_word_signs(words codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
// The value of a byte of each dword as int8, of a half as bfloat16.
template <int kByte>
inline f32v byte_value(words codes) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * kByte), 24))};
}
// Calls use(j, values) for the eight e2m1 codes of every packed dword, in order.
constexpr float kE2m1Unit = 1.0f;
template <int kNibble>
MXMOE_INLINE f32v e2m1_value(words codes) {
  const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f,
                                       -2.0f, -3.0f, -4.0f, -6.0f);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * kNibble), values)};  // looks at the low four bits
}
template <class Use>
MXMOE_INLINE void each_e2m1(words codes, const Use& use) {
  use(0, e2m1_value<0>(codes)), use(1, e2m1_value<4>(codes)), use(2, e2m1_value<1>(codes));
  use(3, e2m1_value<5>(codes)), use(4, e2m1_value<2>(codes)), use(5, e2m1_value<6>(codes));
  use(6, e2m1_value<3>(codes)), use(7, e2m1_value<7>(codes));
}
inline f32v low_bf16(words pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))}; }
inline f32v high_bf16(words pairs) {
  return {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))};
}
}  // namespace avx512
}  // namespace mxmoe
#include "core/target_end.h"
