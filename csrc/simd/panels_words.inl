// Products of bfloat16 activations by panels of sixteen weight rows, as 16-bit integers (see prepare_int16.inl):
// faster than float32 products where there is no fast one of bfloat16. A block's products are summed exactly.
// Included after simd/panels_decoded.inl and simd/prepare_int16.inl.

struct WordArithmetic {
  using Sum = words;
  static constexpr int kSteps = kMxBlock / 2;
  static words start(const BlockMeta* meta) { return words_of_32(meta->start); }
  static MXMOE_INLINE words weight_at(const char* p) { return load_words(p); }
  static MXMOE_INLINE void put_weight(char* p, words weight) { store_words(p, weight); }
  static MXMOE_INLINE words broadcast(const char* x) { return broadcast_word(x); }
  static MXMOE_INLINE words add_product(words sum, words codes, words weight) {
    return add_dot_16(sum, weight, codes);
  }
  // The activations' scale first: with that of the weights it may be no number.
  template <bool kScaled>
  static MXMOE_INLINE f32v finish(f32v sum, words dot, f32v scale, const BlockMeta* meta) {
    return fma(mul(to_floats(dot), set1(meta->scale)), scale, sum);
  }
};
template <class F>
using WordProduct = DecodedProduct<F, WordArithmetic>;

// Codes raised by 12, and doubled to be integers: the activations' scales are halved for it.
struct WordsMxfp4 : WordProduct<WordsMxfp4> {
  static constexpr int kPackedBytes = kPackedMxfp4Bytes, kScaleBytes = 1, kDwords = kMxBlockBytes / 4, kRaise = 12;
  static constexpr float kUnit = 0.5f;
  static constexpr bool kEvenFirst = false;
  static words pack(words codes) { return pack_words(codes); }
  static f32v scale(const char* p) { return e8m0_scales(reinterpret_cast<const uint8_t*>(p)); }
  template <class Use>
  static MXMOE_INLINE void each_of(words codes, const Use& use) {
    const words low = raised_e2m1(codes), high = raised_e2m1(shift_right_4(codes));
    use(0, even_bytes(low)), use(1, even_bytes(high)), use(2, odd_bytes(low)), use(3, odd_bytes(high));
  }
};

// Codes raised by 128.
struct WordsI8 : WordProduct<WordsI8> {
  static constexpr int kPackedBytes = kPackedInt8Bytes, kScaleBytes = 2, kDwords = kMxBlock / 4, kRaise = 128;
  static constexpr float kUnit = 1.0f;
  static constexpr bool kEvenFirst = true;
  static words pack(words codes) { return flip_word_signs(codes); }
  static f32v scale(const char* p) { return load(reinterpret_cast<const bf16*>(p)); }
  template <class Use>
  static MXMOE_INLINE void each_of(words codes, const Use& use) {
    use(0, even_bytes(codes)), use(1, odd_bytes(codes));
  }
};
