// Products of int8 activations by panels, with vpdpbusd: weights are raised to be unsigned bytes, four values of K a
// lane. Included after panels_avx512x.inl.

// A block's scale of the weights, unless they have it in them, times that of the activations.
template <bool kFold>
MXMOE_INLINE __m512 both_scales(__m512 weights, const float& activations) {
  const __m512 of_token = _mm512_set1_ps(activations);
  return kFold ? of_token : _mm512_mul_ps(weights, of_token);
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

// Codes doubled to be integers: the activations' scales are halved for it. Raised by 96 to be unsigned, also when
// they are scaled up by three binades.
struct PanelI8Mxfp4 : ByteDots {
  using Few = PanelI8Mxfp4;
  static constexpr bool kInteger = true, kScaled = true, kDecoded = true, kPowers = true;
  static constexpr int kGroup = 6, kVectors = 8, kChunk = 16, kPackedBytes = kPackedMxfp4Bytes;
  static constexpr int kRaise = 96, kFoldedBinades = 3;
  static MXMOE_INLINE __m512i look_up(__m512i codes, int raise) {
    const auto byte = [&](int value) { return static_cast<char>(raise + value); };
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(byte(0), byte(1), byte(2), byte(3), byte(4), byte(6),
                                                               byte(8), byte(12), byte(0), byte(-1), byte(-2),
                                                               byte(-3), byte(-4), byte(-6), byte(-8), byte(-12)));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }
  static MXMOE_INLINE __m512i decode(__m512i codes) { return look_up(codes, kRaise); }
  // What is raised by no more than it takes can be shifted up, each lane by its row's exponent, without touching the
  // byte above, and is raised further then.
  static constexpr int kLeastRaise = 12;
  struct Lift {
    __m512i shift, add;
  };
  static MXMOE_INLINE Lift lift(__m512i exponents) {
    const __m512i raised = _mm512_sllv_epi32(_mm512_set1_epi8(kLeastRaise), exponents);
    return {exponents, _mm512_sub_epi32(_mm512_set1_epi8(kRaise), raised)};
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i nibbles(const Load& dword) {
    return v % 2 == 0 ? dword(v / 2) : _mm512_srli_epi16(dword(v / 2), 4);
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return decode(nibbles<v>(dword));
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword, const Lift& lift) {
    const __m512i raised = look_up(nibbles<v>(dword), kLeastRaise);
    return _mm512_add_epi32(_mm512_sllv_epi32(raised, lift.shift), lift.add);
  }
  static __m512 scale(const char* p) { return packed_e8m0_scale(p); }
  // Sums, and what they leave when they cancel, are multiples of 2^-23 of the smallest scales' product, 2^-103 or
  // more, and below 2^56 times the largest's for any K below 2^40: all are normal numbers, also when they are 2^20
  // times as large or small, in units of their rows.
  static bool folds(const ScaleRange& weights, const ScaleRange& activations) {
    return exponent_of(weights.lowest) >= 127 - 20 && exponent_of(weights.highest) <= 127 + 20 &&
           exponent_of(activations.lowest) >= 127 - 60 && exponent_of(activations.highest) <= 127 + 20;
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
