// Products of bfloat16 activations by panels where vdpbf16ps is slow or missing: with vpdpwssd, as 16-bit integers
// (see quantize_block_i16), two values of K a lane. A block's products are summed exactly. Included after
// panels_avx512x.inl.

struct WordDots {
  static constexpr bool kInteger = true, kScaled = true, kDecoded = true, kPowers = false;
  static constexpr int kGroup = 6, kVectors = 16, kChunk = 8;
  static MXMOE_INLINE __m512i product(__m512i sum, __m512i weights, __m512i codes) {
    return _mm512_dpwssd_epi32(sum, weights, codes);
  }
  // The activations' scale first: with that of the weights it may be no number.
  template <bool kFold>
  static MXMOE_INLINE __m512 add_scaled(__m512 sum, __m512i dot, __m512 scale, const float& activations) {
    return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(activations)), scale, sum);
  }
};

// Codes doubled to be integers: the activations' scales are halved for it.
struct PanelI16Mxfp4 : WordDots {
  static constexpr int kPackedBytes = kPackedMxfp4Bytes, kRaise = 0;
  static constexpr bool kEvenFirst = false;
  static constexpr float kUnit = 0.5f;
  // The permute looks at the low five bits of a word, the fifth of which is part of another code: the table stands
  // twice.
  static MXMOE_INLINE __m512i decode(__m512i words) {
    const __m512i table =
        _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    return _mm512_permutexvar_epi16(words, table);
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return decode(mxfp4_words<v>(dword));
  }
  static __m512 scale(const char* p) { return packed_e8m0_scale(p); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    unpack_mxfp4_words<PanelI16Mxfp4>(panel, block, out, stride);
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_e8m0_scales(panel, first, count, out, stride);
  }
};

// Codes raised by 128, of each four the even ones and then the odd.
struct PanelI16I8 : WordDots {
  static constexpr int kPackedBytes = kPackedInt8Bytes, kRaise = 128;
  static constexpr bool kEvenFirst = true;
  static constexpr float kUnit = 1.0f;
  static MXMOE_INLINE __m512i even(__m512i codes) { return _mm512_and_si512(codes, _mm512_set1_epi16(255)); }
  static MXMOE_INLINE __m512i odd(__m512i codes) { return _mm512_srli_epi16(codes, 8); }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return v % 2 == 0 ? even(dword(v / 2)) : odd(dword(v / 2));
  }
  static __m512 scale(const char* p) { return packed_bf16_scale(p); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    for (int half = 0; half < 2; ++half) {
      const Dwords codes = gather_dwords(panel, block * kMxBlock + 16 * half);
      for (int i = 0; i < 4; ++i) {
        const __m512i raised = _mm512_xor_si512(codes.dword[i], _mm512_set1_epi8(-128));
        put(out + (8 * half + 2 * i) * stride, even(raised));
        put(out + (8 * half + 2 * i + 1) * stride, odd(raised));
      }
    }
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_bf16_scales(panel, first, count, out, stride);
  }
};
