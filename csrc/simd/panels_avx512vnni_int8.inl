// Products of int8 activations by panels, with vpdpbusd: weights are raised to be unsigned bytes, four values of K a
// lane. Included after panels_avx512x.inl.

// A block's scale of the weights times that of the activations.
template <bool kFold>
MXMOE_INLINE __m512 both_scales(__m512 weights, const float& activations) {
  if (!kFold) return _mm512_mul_ps(weights, _mm512_set1_ps(activations));
  const __m512i exponents = _mm512_sub_epi32(_mm512_castps_si512(weights), _mm512_set1_epi32(0x3f800000));
  return _mm512_castsi512_ps(_mm512_add_epi32(exponents, broadcast_dword(&activations)));
}

struct ByteDots : DwordTokens {
  static MXMOE_INLINE __m512i start(const BlockMeta* block) { return _mm512_set1_epi32(block->start); }
  static MXMOE_INLINE __m512i product(__m512i sum, __m512i weights, __m512i codes) {
    return _mm512_dpbusd_epi32(sum, weights, codes);
  }
  template <bool kFold>
  static MXMOE_INLINE __m512 add_scaled(__m512 sum, __m512i dot, __m512 scale, const float& activations) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both_scales<kFold>(scale, activations), sum);
  }
};

// Codes raised by 12 to be unsigned, and doubled to be integers: the activations' scales are halved for it.
struct PanelI8Mxfp4 : ByteDots {
  using Few = PanelI8Mxfp4;
  static constexpr bool kInteger = true, kScaled = true, kDecoded = true, kPowers = true;
  static constexpr int kGroup = 6, kVectors = 8, kChunk = 16, kPackedBytes = kPackedMxfp4Bytes;
  static MXMOE_INLINE __m512i decode(__m512i codes) {
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return decode(v % 2 == 0 ? dword(v / 2) : _mm512_srli_epi16(dword(v / 2), 4));
  }
  static __m512 scale(const char* p) { return packed_e8m0_scale(p); }
  // Every product of two scales is a normal number.
  static bool folds(const ScaleRange& weights, const ScaleRange& activations) {
    constexpr int kBias = 127, kTop = 254;
    const auto normal = [](int32_t exponent) { return exponent > 0 && exponent <= kTop; };
    for (const int32_t w : {exponent_of(weights.lowest), exponent_of(weights.highest)}) {
      for (const int32_t a : {exponent_of(activations.lowest), exponent_of(activations.highest)}) {
        if (!normal(w) || !normal(a) || !normal(w + a - kBias)) return false;
      }
    }
    return true;
  }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    const Dwords codes = gather_dwords(panel, block * kMxBlockBytes);
    for (int i = 0; i < 4; ++i) {
      put(out + 2 * i * stride, decode(codes.dword[i]));
      put(out + (2 * i + 1) * stride, decode(_mm512_srli_epi16(codes.dword[i], 4)));
    }
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_e8m0_scales(panel, first, count, out, stride);
  }
};

// Codes raised by 128.
struct PanelI8I8 : ByteDots {
  using Few = PanelI8I8;
  static constexpr bool kInteger = true, kScaled = true, kDecoded = false, kPowers = false;
  static constexpr int kGroup = 6, kVectors = 8, kChunk = 16, kPackedBytes = kPackedInt8Bytes;
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return dword(v);
  }
  static __m512 scale(const char* p) { return packed_bf16_scale(p); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    for (int half = 0; half < 2; ++half) {
      const Dwords codes = gather_dwords(panel, block * kMxBlock + 16 * half);
      for (int i = 0; i < 4; ++i) {
        put(out + (4 * half + i) * stride, _mm512_xor_si512(codes.dword[i], _mm512_set1_epi8(-128)));
      }
    }
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_bf16_scales(panel, first, count, out, stride);
  }
};

// The order in which an int8 product wants the activations of each eight values of K.
enum class CodeOrder { kPlain, kStored, kPacked };

inline __m256i code_order(CodeOrder order) {
  const __m128i stored = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m128i packed = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  return _mm256_broadcastsi128_si256(order == CodeOrder::kStored ? stored : packed);
}

// int8 codes per block of 32 as in prepare_i8, with their BlockMeta. Weights are raised by kRaise; kUnit is what
// an integer of theirs is worth.
template <int kRaise, CodeOrder kOrder, typename X>
inline void prepare_panel_i8(const X* x, int64_t k, const PreparedRows& to, int64_t row) {
  constexpr float kUnit = kOrder == CodeOrder::kPlain ? 1.0f : 0.5f;
  int8_t* codes = static_cast<int8_t*>(to.values) + row * to.value_stride;
  BlockMeta* meta = reinterpret_cast<BlockMeta*>(to.scales + row * to.block_stride);
  ScaleRange range = kNoScales;
  for (int64_t b = 0; b < k / kMxBlock; ++b) {
    __m256i* at = reinterpret_cast<__m256i*>(codes + b * kMxBlock);
    const float scale = kUnit * quantize_block_i8(x + b * kMxBlock, codes + b * kMxBlock);
    meta[b].scale = scale == 0.0f ? 1.0f : scale;  // nothing but zeros: any scale will do, a normal one does best
    int32_t bits;
    std::memcpy(&bits, &meta[b].scale, sizeof bits);
    range.lowest = bits < range.lowest ? bits : range.lowest;
    range.highest = bits > range.highest ? bits : range.highest;
    const __m256i block = _mm256_loadu_si256(at);
    const __m256i raised =
        _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(static_cast<char>(kRaise)), block);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(raised), _mm256_extracti128_si256(raised, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    meta[b].start = -_mm_cvtsi128_si32(sum);
    if (kOrder != CodeOrder::kPlain) _mm256_storeu_si256(at, _mm256_shuffle_epi8(block, code_order(kOrder)));
  }
  *row_range(to, row) = range;
}
