// Products of int8 activations by panels of sixteen weight rows with a dot product of bytes, as in panels_bytes.inl,
// whose bits they give: weights are raised to be unsigned. Included after simd/panels_bytes.inl.

// The dwords of four values of K times those of every token.
template <int M>
MXMOE_INLINE void add_dots(const words (&w)[kParts], const char* const (&x)[M], int at, words (&dot)[M][kParts]) {
  for (int m = 0; m < M; ++m) {
    const words codes = broadcast_word(x[m] + at);
    for (int p = 0; p < kParts; ++p) dot[m][p] = add_dot(dot[m][p], w[p], codes);
  }
}

// Bytes as they are multiplied; the scales are another format's where that one was decoded to them.
template <class F, class Scales = F>
struct DotBytes : ByteProduct<F> {
  static constexpr int kTogether = kParts, kPackedBytes = kPackedInt8Bytes, kTokenBytes = kMxBlock;
  static constexpr int kScaleBytes = Scales::kScaleBytes, kDwords = kMxBlock / 4;
  static f32v scale(const char* p) { return Scales::scale(p); }
  template <int M>
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M][kParts]) {
    for (int i = 0; i < kDwords; ++i) {
      words codes[kParts];
      for (int p = 0; p < kParts; ++p) codes[p] = load_words(w + (i * kPanelRows + p * kLanes) * 4);
      add_dots(codes, x, 4 * i, dot);
    }
  }
};

struct DotI8 : DotBytes<DotI8, BytesI8> {
  static constexpr int kRaise = BytesI8::kRaise;
  static constexpr float kUnit = BytesI8::kUnit;
  static words pack(words codes) { return BytesI8::pack(codes); }
  static void arrange(const int8_t* codes, char* to) { std::memcpy(to, codes, kMxBlock); }
};

struct DecodedMxfp4 : DotBytes<DecodedMxfp4, BytesMxfp4> {};

struct DotMxfp4 : ByteProduct<DotMxfp4> {
  static constexpr int kTogether = kParts;
  static constexpr int kPackedBytes = BytesMxfp4::kPackedBytes, kScaleBytes = BytesMxfp4::kScaleBytes;
  static constexpr int kTokenBytes = BytesMxfp4::kTokenBytes, kRaise = BytesMxfp4::kRaise;
  static constexpr int kDwords = BytesMxfp4::kDwords;
  static constexpr float kUnit = BytesMxfp4::kUnit;
  static words pack(words codes) { return BytesMxfp4::pack(codes); }
  static f32v scale(const char* p) { return BytesMxfp4::scale(p); }
  static void arrange(const int8_t* codes, char* to) { BytesMxfp4::arrange(codes, to); }
  // Both nibbles of a packed dword: what the arranged codes from 8 i and 8 i + 4 on are multiplied with.
  static MXMOE_INLINE void decode(const char* w, int i, int part, words& low, words& high) {
    const words codes = load_words(w + (i * kPanelRows + part * kLanes) * 4);
    low = raised_e2m1(codes), high = raised_e2m1(shift_right_4(codes));
  }
  template <int M>
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M][kParts]) {
    for (int i = 0; i < kDwords; ++i) {
      words low[kParts], high[kParts];
      for (int p = 0; p < kParts; ++p) decode(w, i, p, low[p], high[p]);
      add_dots(low, x, 8 * i, dot);
      add_dots(high, x, 8 * i + 4, dot);
    }
  }

  // For many tokens some blocks are decoded into the first-level cache.
  static void products(const PanelBlocks& at, int64_t panels, const PreparedRows& a, const int64_t* rows,
                       int64_t count, int64_t first, int64_t blocks, float* acc) {
    if (count <= 2 * kGroup) {
      return ByteProduct<DotMxfp4>::products(at, panels, a, rows, count, first, blocks, acc);
    }
    alignas(64) char decoded[kChunk * DecodedMxfp4::kPackedBytes];
    for (int64_t b = 0; b < blocks; b += kChunk) {
      const int64_t some = blocks - b < kChunk ? blocks - b : kChunk;
      for (int64_t block = 0; block < some; ++block) {
        const char* from = at.values_at(0, b + block);
        char* to = decoded + block * DecodedMxfp4::kPackedBytes;
        for (int i = 0; i < kDwords; ++i, to += 2 * 4 * kPanelRows) {
          if (!at.cached) fetch_ahead(from + i * 4 * kPanelRows, at.distance);
          for (int p = 0; p < kParts; ++p) {
            words low, high;
            decode(from, i, p, low, high);
            store_words(to + p * 4 * kLanes, low), store_words(to + 4 * (kPanelRows + p * kLanes), high);
          }
        }
      }
      const PanelBlocks chunk{decoded, at.scales_at(0, b), DecodedMxfp4::kPackedBytes, at.scale_block, 0, 0, true};
      DecodedMxfp4::products(chunk, 1, a, rows, count, first + b, some, acc);
    }
  }
};
