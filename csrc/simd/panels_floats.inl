// Products of float32 activations (or bfloat16 held in float32) by panels of sixteen weight rows, with fused
// multiply-adds. Included after simd/panels_decoded.inl.

struct FloatArithmetic {
  using Sum = f32v;
  static constexpr int kSteps = kMxBlock;
  static f32v start(const BlockMeta*) { return zero(); }
  static MXMOE_INLINE f32v weight_at(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static MXMOE_INLINE void put_weight(char* p, f32v weight) { store(reinterpret_cast<float*>(p), weight); }
  static MXMOE_INLINE f32v broadcast(const char* x) { return set1(*reinterpret_cast<const float*>(x)); }
  static MXMOE_INLINE f32v add_product(f32v sum, f32v values, f32v weight) { return fma(values, weight, sum); }
  template <bool kScaled>
  static MXMOE_INLINE f32v finish(f32v sum, f32v dot, f32v scale, const BlockMeta*) {
    return kScaled ? fma(dot, scale, sum) : add(sum, dot);
  }
};
template <class F>
using FloatProduct = DecodedProduct<F, FloatArithmetic>;

struct FloatsMxfp4 : FloatProduct<FloatsMxfp4> {
  static constexpr int kPackedBytes = kPackedMxfp4Bytes, kScaleBytes = 1, kDwords = kMxBlockBytes / 4;
  static words pack(words codes) { return pack_words(codes); }
  static f32v scale(const char* p) { return mul(e8m0_scales(reinterpret_cast<const uint8_t*>(p)), set1(kE2m1Unit)); }
  template <class Use>
  static MXMOE_INLINE void each_of(words codes, const Use& use) {
    each_e2m1(codes, use);
  }
};

struct FloatsI8 : FloatProduct<FloatsI8> {
  static constexpr int kPackedBytes = kPackedInt8Bytes, kScaleBytes = 2, kDwords = kMxBlock / 4;
  static words pack(words codes) { return flip_word_signs(codes); }
  static f32v scale(const char* p) { return load(reinterpret_cast<const bf16*>(p)); }
  template <class Use>
  static MXMOE_INLINE void each_of(words raised, const Use& use) {
    const words codes = flip_word_signs(raised);
    use(0, byte_value<0>(codes)), use(1, byte_value<1>(codes));
    use(2, byte_value<2>(codes)), use(3, byte_value<3>(codes));
  }
};

struct FloatsBf16 : FloatProduct<FloatsBf16> {
  static constexpr int kPackedBytes = kPackedBf16Bytes, kScaleBytes = 0, kDwords = kMxBlock / 2;
  static words pack(words pairs) { return pairs; }
  static f32v scale(const char*) { return zero(); }
  template <class Use>
  static MXMOE_INLINE void each_of(words pairs, const Use& use) {
    use(0, low_bf16(pairs)), use(1, high_bf16(pairs));
  }
};
