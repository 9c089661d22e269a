// The vector vocabulary in AVX2 and FMA: eight lanes. Meanings as in scalar.h.
#pragma once

#include <immintrin.h>

#include "core/fetch.h"
#include "core/types.h"

#define MXMOE_SIMD avx2

#include "core/target_avx2.h"
namespace mxmoe {
namespace avx2 {

constexpr int kLanes = 8;

struct f32v {
  __m256 v;
};

inline f32v set1(float x) { return {_mm256_set1_ps(x)}; }
inline f32v zero() { return {_mm256_setzero_ps()}; }
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline f32v load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, f32v x) { _mm256_storeu_ps(p, x.v); }
inline f32v load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
inline void store_n(float* p, f32v x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x.v); }

inline f32v from_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline f32v load(const bf16* p) { return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline f32v load_n(const bf16* p, int n) {
  if (n == kLanes) return load(p);
  bf16 part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(bf16));
  return load(part);
}
// Rounded to bfloat16, in the upper half of each lane; what is below is not cleared.
inline __m256i bf16_in_upper_half(f32v x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  return _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)));
}
inline f32v rounded_to_bf16(f32v x) {
  return {_mm256_castsi256_ps(_mm256_and_si256(bf16_in_upper_half(x), _mm256_set1_epi32(-65536)))};
}
inline __m128i to_bf16_bits(f32v x) {
  const __m256i both = _mm256_srli_epi32(bf16_in_upper_half(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}
inline void store(bf16* p, f32v x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16_bits(x)); }
inline void store_n(bf16* p, f32v x, int n) {
  bf16 part[kLanes];
  store(part, x);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(bf16));
}
inline f32v load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline f32v load_n(const int8_t* p, int n) {
  if (n == kLanes) return load(p);
  int8_t part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n));
  return load(part);
}

inline f32v add(f32v a, f32v b) { return {_mm256_add_ps(a.v, b.v)}; }
inline f32v sub(f32v a, f32v b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline f32v mul(f32v a, f32v b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline f32v div(f32v a, f32v b) { return {_mm256_div_ps(a.v, b.v)}; }
inline f32v min(f32v a, f32v b) { return {_mm256_min_ps(a.v, b.v)}; }
inline f32v max(f32v a, f32v b) { return {_mm256_max_ps(a.v, b.v)}; }
inline f32v fma(f32v a, f32v b, f32v c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline f32v abs(f32v x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
inline f32v round(f32v x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline f32v scale_by_pow2(f32v x, f32v n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)))};
}
inline f32v select_lt(f32v a, f32v b, f32v x, f32v y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline f32v iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
inline void transpose(f32v (&rows)[kLanes]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {  // fours[i + c]: columns c and c + 4 of rows i to i + 3
    for (int c = 0; c < 2; ++c) {
      fours[i + 2 * c] = _mm256_shuffle_ps(pairs[i + c], pairs[i + 2 + c], 0x44);
      fours[i + 2 * c + 1] = _mm256_shuffle_ps(pairs[i + c], pairs[i + 2 + c], 0xee);
    }
  }
  for (int c = 0; c < 4; ++c) {
    rows[c].v = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
    rows[4 + c].v = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
  }
}
inline float reduce_add(f32v x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}
inline float reduce_max(f32v x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  s = _mm_max_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}
// Rounded to the nearest integer, which must fit.
inline void store_i16(int16_t* p, f32v x) {
  const __m256i i32 = _mm256_cvtps_epi32(x.v);
  const __m128i i16 = _mm_packs_epi32(_mm256_castsi256_si128(i32), _mm256_extracti128_si256(i32, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), i16);
}
inline void store_i8(int8_t* p, f32v x) {
  const __m256i i32 = _mm256_cvtps_epi32(x.v);
  const __m128i i16 = _mm_packs_epi32(_mm256_castsi256_si128(i32), _mm256_extracti128_si256(i32, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(i16, i16));
}

// --- dwords of a panel, for simd/panels*.inl ---

using words = __m256i;
inline words load_words(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_words(char* p, words x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline words words_of_floats(f32v x) { return _mm256_castps_si256(x.v); }  // the bits
inline words broadcast_word(const char* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return _mm256_set1_epi32(x);
}
inline words words_of_16(int16_t x) { return _mm256_set1_epi16(x); }
inline words words_of_32(int32_t x) { return _mm256_set1_epi32(x); }
inline words shift_right_4(words x) { return _mm256_srli_epi16(x, 4); }
// Doubled values of the codes in the low nibbles, raised by 12.
inline words raised_e2m1(words codes) {
  const words table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  return _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
}
inline words even_bytes(words x) { return _mm256_and_si256(x, _mm256_set1_epi16(255)); }
inline words odd_bytes(words x) { return _mm256_srli_epi16(x, 8); }
// Sums of two neighbouring products: of unsigned with signed bytes, which must fit 16 bits; of 16-bit numbers.
inline words multiply_bytes(words u, words s) { return _mm256_maddubs_epi16(u, s); }
inline words multiply_16(words a, words b) { return _mm256_madd_epi16(a, b); }
inline words add_16(words a, words b) { return _mm256_add_epi16(a, b); }
inline words add_32(words a, words b) { return _mm256_add_epi32(a, b); }
// Plus the sums of two neighbouring products of 16-bit numbers.
inline words add_dot_16(words sum, words a, words b) {
  sum = add_32(sum, multiply_16(a, b));
  __asm__("" : "+x"(sum));  // GCC would add up many products first, and run out of registers
  return sum;
}
inline f32v to_floats(words x) { return {_mm256_cvtepi32_ps(x)}; }
// 2^(byte - 127) for every lane. 2^-127 is subnormal in float32.
inline f32v e8m0_scales(const uint8_t* p) {
  const words exponents =
      _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 23);
  return {_mm256_castsi256_ps(_mm256_max_epi32(exponents, _mm256_set1_epi32(0x00400000)))};
}
// As in core/packed.h, of every dword.
inline words gather_nibbles(words x) {
  x = _mm256_and_si256(x, _mm256_set1_epi32(0x0f0f0f0f));
  x = _mm256_and_si256(_mm256_or_si256(x, _mm256_srli_epi32(x, 4)), _mm256_set1_epi32(0x00ff00ff));
  return _mm256_and_si256(_mm256_or_si256(x, _mm256_srli_epi32(x, 8)), _mm256_set1_epi32(0xffff));
}
inline words pack_words(words codes) {
  return _mm256_or_si256(gather_nibbles(codes), _mm256_slli_epi32(gather_nibbles(_mm256_srli_epi32(codes, 4)), 16));
}
inline words flip_word_signs(words codes) { return _mm256_xor_si256(codes, _mm256_set1_epi8(-128)); }
// The value of a byte of each dword as int8, of a half as bfloat16.
template <int kByte>
MXMOE_INLINE f32v byte_value(words codes) {
  // A shuffle brings the byte to the top: shifts, conversions and products share two ports of most CPUs.
  constexpr int k = kByte * 0x01000000;
  const words top = _mm256_broadcastsi128_si256(_mm_setr_epi32(k, k + 0x04000000, k + 0x08000000, k + 0x0c000000));
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(kByte == 3 ? codes : _mm256_shuffle_epi8(codes, top), 24))};
}
// Calls use(j, values) for the eight e2m1 codes of every packed dword, in order: doubled, as bytes are looked up
// faster than floats.
constexpr float kE2m1Unit = 0.5f;
template <class Use>
MXMOE_INLINE void each_e2m1(words codes, const Use& use) {
  const words table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  const words low = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
  const words high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15)));
  use(0, byte_value<0>(low)), use(1, byte_value<2>(low)), use(2, byte_value<0>(high)), use(3, byte_value<2>(high));
  use(4, byte_value<1>(low)), use(5, byte_value<3>(low)), use(6, byte_value<1>(high)), use(7, byte_value<3>(high));
}
inline f32v low_bf16(words pairs) { return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))}; }
inline f32v high_bf16(words pairs) {
  return {_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)))};
}

}  // namespace avx2
}  // namespace mxmoe
#include "core/target_end.h"
