// Products of int8 activations by panels of sixteen weight rows with a dot product of bytes: as in panels_bytes.inl,
// whose bits they give. Included after that.

// The dwords of four values of K times those of every token.
template <int M>
MXMOE_INLINE void add_dots(const words (&w)[kParts], const char* const (&x)[M], int at, words (&dot)[M][kParts]) {
  for (int m = 0; m < M; ++m) {
    const words codes = broadcast_word(x[m] + at);
    for (int p = 0; p < kParts; ++p) dot[m][p] = add_dot(dot[m][p], w[p], codes);
  }
}

struct ByteDots {
  template <int M, class Load>
  static MXMOE_INLINE void add(const Load& load, const char* const (&x)[M], words (&dot)[M][kParts]) {
    for (int i = 0; i < kMxBlock / 8; ++i) {
      words low[kParts], high[kParts];
      for (int p = 0; p < kParts; ++p) load(i, p, low[p], high[p]);
      add_dots(low, x, 8 * i, dot);
      add_dots(high, x, 8 * i + 4, dot);
    }
  }
};
using DotMxfp4 = Mxfp4<ByteDots>;

struct DotI8 : ByteProduct<DotI8> {
  static constexpr int kPackedBytes = kPackedInt8Bytes, kScaleBytes = 2, kTokenBytes = kMxBlock, kRaise = 128;
  static constexpr int kDwords = kMxBlock / 4;
  static constexpr float kUnit = 1.0f;
  static words pack(words codes) { return BytesI8::pack(codes); }
  static f32v scale(const char* p) { return BytesI8::scale(p); }
  static void arrange(const int8_t* codes, char* to) { std::memcpy(to, codes, kMxBlock); }
  template <int M>
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M][kParts]) {
    for (int i = 0; i < kDwords; ++i) {
      words codes[kParts];
      for (int p = 0; p < kParts; ++p) codes[p] = load_words(w + (i * kPanelRows + p * kLanes) * 4);
      add_dots(codes, x, 4 * i, dot);
    }
  }
};
