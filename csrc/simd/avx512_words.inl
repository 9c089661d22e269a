// The vector vocabulary in AVX-512 F, BW, DQ, VL: sixteen lanes. Meanings as in scalar.h. Included inside the
// namespace and target region of avx512.h and of avx512x.h, each of which compiles its own copy.

constexpr int kLanes = 16;

struct f32v {
  __m512 v;
};

inline f32v set1(float x) { return {_mm512_set1_ps(x)}; }
inline f32v zero() { return {_mm512_setzero_ps()}; }
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline f32v load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, f32v x) { _mm512_storeu_ps(p, x.v); }
inline f32v load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store_n(float* p, f32v x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }

inline f32v from_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline f32v load(const bf16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline f32v load_n(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
// Rounded to bfloat16, in the upper half of each lane; what is below is not cleared.
inline __m512i bf16_in_upper_half(f32v x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
}
inline f32v rounded_to_bf16(f32v x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(bf16_in_upper_half(x), _mm512_set1_epi32(-65536)))};
}
inline __m256i to_bf16_bits(f32v x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_in_upper_half(x), 16)); }
inline void store(bf16* p, f32v x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(x)); }
inline void store_n(bf16* p, f32v x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16_bits(x)); }
inline f32v load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline f32v load_n(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)))};
}

inline f32v add(f32v a, f32v b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32v sub(f32v a, f32v b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32v mul(f32v a, f32v b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32v div(f32v a, f32v b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f32v min(f32v a, f32v b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f32v max(f32v a, f32v b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32v fma(f32v a, f32v b, f32v c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline f32v abs(f32v x) { return {_mm512_abs_ps(x.v)}; }
inline f32v round(f32v x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline f32v scale_by_pow2(f32v x, f32v n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_mul_ps(x.v, _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23)))};
}
inline f32v select_lt(f32v a, f32v b, f32v x, f32v y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
inline f32v iota() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
inline void transpose(f32v (&rows)[kLanes]) {
  __m512 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // fours[i + c]: columns c, c + 4, c + 8 and c + 12 of rows i to i + 3
    for (int c = 0; c < 2; ++c) {
      fours[i + 2 * c] = _mm512_shuffle_ps(pairs[i + c], pairs[i + 2 + c], 0x44);
      fours[i + 2 * c + 1] = _mm512_shuffle_ps(pairs[i + c], pairs[i + 2 + c], 0xee);
    }
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even0 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
    const __m512 even1 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
    const __m512 odd1 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
    rows[c].v = _mm512_shuffle_f32x4(even0, even1, 0x88);
    rows[4 + c].v = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    rows[8 + c].v = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    rows[12 + c].v = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}
inline float reduce_add(f32v x) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}
inline float reduce_max(f32v x) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  s = _mm_max_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}
// Rounded to the nearest integer, which must fit.
inline void store_i16(int16_t* p, f32v x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
}
inline void store_i8(int8_t* p, f32v x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
