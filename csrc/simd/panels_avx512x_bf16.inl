// Products of bfloat16 activations by panels, with vdpbf16ps: two values of K a lane. Included after
// panels_avx512x.inl.

struct Bf16Dots : DwordTokens {
  static MXMOE_INLINE __m512i start(const BlockMeta*) { return _mm512_setzero_si512(); }
  static MXMOE_INLINE __m512i product(__m512i sum, __m512i weights, __m512i values) {
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)weights, (__m512bh)values));
  }
};

struct PanelBf16Mxfp4 : Bf16Dots {
  using Few = PanelBf16Mxfp4;
  static constexpr bool kInteger = false, kScaled = true, kDecoded = true, kPowers = true;
  static constexpr int kGroup = 8, kVectors = 16, kChunk = 8, kPackedBytes = kPackedMxfp4Bytes;
  // The permute looks at the low five bits of a word, the fifth of which is part of another code: the table of the
  // sixteen values as bfloat16 stands twice.
  static MXMOE_INLINE __m512i look_up(__m512i words, int raised, int minus_zero) {
    const auto value = [&](int bits) { return static_cast<short>(bits + raised); };
    const __m512i table = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(0, value(0x3f00), value(0x3f80), value(0x3fc0), value(0x4000), value(0x4040), value(0x4080),
                          value(0x40c0), static_cast<short>(minus_zero), value(0xbf00), value(0xbf80), value(0xbfc0),
                          value(0xc000), value(0xc040), value(0xc080), value(0xc0c0)));
    return _mm512_permutexvar_epi16(words, table);
  }
  static MXMOE_INLINE __m512i decode(__m512i words) { return look_up(words, 0, 0x8000); }
  // The exponents stand in the table as high as they go; what a scale leaves of that is taken off, and zeros stay.
  static constexpr int kRaised = 125, kExponentBit = 7, kFoldedBinades = 40;
  static MXMOE_INLINE __m512i decode(__m512i words, __m512i lowered) {
    return _mm512_subs_epu16(look_up(words, kRaised << kExponentBit, 0), lowered);
  }
  // By how much for scales that fold, given as exponents, for both words of a lane.
  static MXMOE_INLINE __m512i lift(__m512i exponents) {
    const __m512i off = _mm512_sub_epi32(_mm512_set1_epi32(kRaised), exponents);
    return _mm512_mullo_epi32(off, _mm512_set1_epi32(0x10001 << kExponentBit));
  }
  // A product, and what sums of products leave when they cancel, is a multiple of 2^-7 of the smallest activation and
  // of half the smallest scale, 2^-108 or more: all are normal numbers, so that it is the same whether they or their
  // sum are scaled.
  static bool folds(const ScaleRange& weights, const ScaleRange& activations) {
    return exponent_of(weights.lowest) >= 127 - 20 && exponent_of(weights.highest) <= 127 + 20 &&
           exponent_of(activations.lowest) >= 127 - 80 && exponent_of(activations.highest) <= 127 + 60;
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return decode(mxfp4_words<v>(dword));
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword, __m512i lowered) {
    return decode(mxfp4_words<v>(dword), lowered);
  }
  static __m512 scale(const char* p) { return packed_e8m0_scale(p); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    unpack_mxfp4_words<PanelBf16Mxfp4>(panel, block, out, stride);
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_e8m0_scales(panel, first, count, out, stride);
  }
};

struct PanelBf16I8 : Bf16Dots {
  using Few = PanelBf16I8;
  static constexpr bool kInteger = false, kScaled = true, kDecoded = true, kPowers = false;
  static constexpr int kGroup = 8, kVectors = 16, kChunk = 8, kPackedBytes = kPackedInt8Bytes;
  // Byte `kByte` of every lane as float32: exact in its upper half, which is the bfloat16.
  template <int kByte>
  static MXMOE_INLINE __m512i as_float(__m512i codes) {
    const __m512i value = _mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * kByte), 24);
    return _mm512_castps_si512(_mm512_cvtepi32_ps(value));
  }
  template <int kPair>
  static MXMOE_INLINE __m512i decode(__m512i codes) {
    return _mm512_or_si512(_mm512_srli_epi32(as_float<2 * kPair>(codes), 16), as_float<2 * kPair + 1>(codes));
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return decode<v % 2>(_mm512_xor_si512(dword(v / 2), _mm512_set1_epi8(-128)));
  }
  static __m512 scale(const char* p) { return packed_bf16_scale(p); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    for (int half = 0; half < 2; ++half) {
      const Dwords codes = gather_dwords(panel, block * kMxBlock + 16 * half);
      for (int i = 0; i < 4; ++i) {
        put(out + (8 * half + 2 * i) * stride, decode<0>(codes.dword[i]));
        put(out + (8 * half + 2 * i + 1) * stride, decode<1>(codes.dword[i]));
      }
    }
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_bf16_scales(panel, first, count, out, stride);
  }
};

struct PanelBf16Bf16 : Bf16Dots {
  using Few = PanelBf16Bf16;
  static constexpr bool kInteger = false, kScaled = false, kDecoded = false, kPowers = false;
  static constexpr int kGroup = 8, kVectors = 16, kChunk = 8, kPackedBytes = kPackedBf16Bytes;
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return dword(v);
  }
  static __m512 scale(const char*) { return _mm512_setzero_ps(); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t k, uint8_t* out, int stride) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t at = block * kMxBlock + 8 * quarter;
      // The activations are padded with zeros, the weights are not.
      const Dwords pairs = gather_dwords(panel, 2 * (at < k ? at : 0), 2 * (k - at));
      for (int i = 0; i < 4; ++i) put(out + (4 * quarter + i) * stride, pairs.dword[i]);
    }
  }
  static void unpack_scales(const StoredPanel&, int64_t, int, float*, int) {}
};

template <typename X>
inline void prepare_panel_bf16(const X* x, int64_t k, const PreparedRows& to, int64_t row) {
  prepare_bf16(x, k, to, row);
  const char* values = static_cast<const char*>(to.values) + row * to.value_stride;
  __m512i lowest = _mm512_set1_epi16(0x7fff), highest = _mm512_setzero_si512();
  for (int64_t i = 0; i < to.value_stride; i += 64) {  // zeros past k
    const __m512i size = _mm512_and_si512(_mm512_loadu_si512(values + i), _mm512_set1_epi16(0x7fff));
    lowest = _mm512_mask_min_epu16(lowest, _mm512_test_epi16_mask(size, size), lowest, size);
    highest = _mm512_max_epu16(highest, size);
  }
  const __m512i top = _mm512_set1_epi32(-65536);
  const __m512i least = _mm512_min_epi32(_mm512_slli_epi32(lowest, 16), _mm512_and_si512(lowest, top));
  const __m512i most = _mm512_max_epi32(_mm512_slli_epi32(highest, 16), _mm512_and_si512(highest, top));
  *row_range(to, row) = {_mm512_reduce_min_epi32(least), _mm512_reduce_max_epi32(most)};
}
