// Products of bfloat16 activations by panels where vdpbf16ps is slow or missing: with vpdpwssd, as 16-bit integers
// (see quantize_block_i16), two values of K a lane. A block's products are summed exactly. For a few tokens, whose
// weights are read as fast as memory goes, the integers are split in upper and lower bytes, which meet weights as
// bytes, four values of K a lane: two products for each vector then, but nothing to widen. The sums are the same
// integers. Included after panels_avx512vnni_int8.inl and prepare_int16.inl.

struct WordDots : DwordTokens {
  static MXMOE_INLINE __m512i start(const BlockMeta* block) { return _mm512_set1_epi32(block->start); }
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

// The upper and lower bytes of prepared integers, four values of K each, which are the rows' second form.
struct ByteTokens {
  struct Dot {
    __m512i upper, lower;
  };
  static constexpr int kTokenBytes = 8;
  static const char* row(const PreparedRows& a, int64_t row) {
    return static_cast<const char*>(a.values) + row * a.value_stride + a.second;
  }
  static MXMOE_INLINE Dot token(const char* p) { return {broadcast_dword(p), broadcast_dword(p + 4)}; }
  static MXMOE_INLINE Dot start(const BlockMeta* block) {
    return {_mm512_setzero_si512(), _mm512_set1_epi32(block->start)};
  }
  static MXMOE_INLINE Dot product(const Dot& sum, __m512i weights, const Dot& codes) {
    return {_mm512_dpbusd_epi32(sum.upper, weights, codes.upper),
            _mm512_dpbusd_epi32(sum.lower, weights, codes.lower)};
  }
  template <bool kFold>
  static MXMOE_INLINE __m512 add_scaled(__m512 sum, const Dot& dot, __m512 scale, const float& activations) {
    const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(dot.upper, 8), dot.lower);
    return WordDots::add_scaled<kFold>(sum, both, scale, activations);
  }
};

// The weights of an int8 product, F, with such activations.
template <class F>
struct SplitI16 : ByteTokens {
  static constexpr bool kInteger = true, kScaled = true;
  static constexpr int kGroup = F::kGroup, kVectors = F::kVectors, kPackedBytes = F::kPackedBytes;
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return F::template vector<v>(dword);
  }
  static __m512 scale(const char* p) { return F::scale(p); }
};

// Codes doubled to be integers: the activations' scales are halved for it. Raised as those that meet bytes are.
struct PanelI16Mxfp4 : WordDots {
  using Few = SplitI16<PanelI8Mxfp4>;
  static constexpr CodeOrder kFewOrder = CodeOrder::kPacked;
  static constexpr int kPackedBytes = kPackedMxfp4Bytes, kRaise = PanelI8Mxfp4::kRaise;
  static constexpr bool kEvenFirst = false;
  static constexpr float kUnit = 0.5f;
  // The permute looks at the low five bits of a word, the fifth of which is part of another code: the table stands
  // twice.
  static MXMOE_INLINE __m512i decode(__m512i words) {
    const __m512i table =
        _mm512_broadcast_i64x4(_mm256_setr_epi16(96, 97, 98, 99, 100, 102, 104, 108, 96, 95, 94, 93, 92, 90, 88, 84));
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
  using Few = SplitI16<PanelI8I8>;
  static constexpr CodeOrder kFewOrder = CodeOrder::kPlain;
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

// Rows as prepare_panel_i16 makes them, and the bytes that F::Few takes.
template <class F, typename X>
inline void prepare_split_i16(const X* x, int64_t k, const PreparedRows& to, int64_t row) {
  prepare_panel_i16<F>(x, k, to, row);
  const auto* words = reinterpret_cast<const int16_t*>(DwordTokens::row(to, row));
  char* bytes = const_cast<char*>(ByteTokens::row(to, row));
  const __m512i in_order = _mm512_broadcast_i32x4(  // from 0, 2, 1, 3
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  const __m512i in_turn = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  for (int64_t i = 0; i < k; i += kMxBlock) {
    __m512i codes = _mm512_loadu_si512(words + i);
    if (F::kEvenFirst) codes = _mm512_shuffle_epi8(codes, in_order);
    // Lower bytes are signed, too, which adds one to the upper ones above those that are negative.
    const __m512i upper = _mm512_srai_epi16(_mm512_add_epi16(codes, _mm512_set1_epi16(128)), 8);
    const __m512i upper_first = _mm512_castsi256_si512(_mm512_cvtepi16_epi8(upper));
    __m512i both = _mm512_inserti64x4(upper_first, _mm512_cvtepi16_epi8(codes), 1);
    if (F::kFewOrder != CodeOrder::kPlain) {
      both = _mm512_shuffle_epi8(both, _mm512_broadcast_i64x4(code_order(F::kFewOrder)));
    }
    _mm512_storeu_si512(bytes + 2 * i, _mm512_permutexvar_epi32(in_turn, both));
  }
}
template <class F>
constexpr PrepareFn kPrepareSplitI16 = {prepare_split_i16<F, float>, prepare_split_i16<F, bf16>};
