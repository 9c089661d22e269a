// Products of int8 activations by panels of sixteen weight rows where there is no dot product of bytes: MXFP4's
// codes, raised by 12, are small enough for sums of four products in 16 bits; int8 weights are widened to 16 bits
// first. The integers and the sums of floats are those of panels_avx512x.inl, in the same order. Included after
// simd/panels.inl.

constexpr int kGroup = 4;  // tokens that share the decoded weights

// What activations of a block have beside their codes.
struct BlockMeta {
  float scale;
  int32_t start;  // -raise * sum of the codes: takes the raise of the weights off again
};

template <class F>
struct ByteProduct {
  static constexpr int kPanels = 1;

  // Blocks [first, first + blocks) of a packed panel times M tokens.
  template <int M>
  static void group(PanelBlocks at, const PreparedRows& a, const int64_t* rows, int64_t first, int64_t blocks,
                    bool fetch, float* acc) {
    const char* x[M];
    const BlockMeta* meta[M];
    f32v sum[M][kParts];
    for (int m = 0; m < M; ++m) {
      x[m] = static_cast<const char*>(a.values) + rows[m] * a.value_stride + first * F::kTokenBytes;
      meta[m] = reinterpret_cast<const BlockMeta*>(a.scales + rows[m] * a.block_stride) + first;
      for (int p = 0; p < kParts; ++p) sum[m][p] = load(acc + m * kPanelRows + p * kLanes);
    }
    for (int64_t b = 0; b < blocks; ++b, at.values += at.value_block, at.scales += at.scale_block) {
      if (fetch) {  // with the scales that lie behind the values, most likely
        for (int i = 0; i <= F::kPackedBytes; i += 64) fetch_ahead(at.values + i, at.distance);
      }
      for (int part = 0; part < kParts; part += F::kTogether) {
        words dot[M][F::kTogether];
        for (int m = 0; m < M; ++m) {
          for (words& start : dot[m]) start = words_of_32(meta[m][b].start);
        }
        F::template multiply<M>(at.values + part * kLanes * 4, x, dot);
        for (int i = 0; i < F::kTogether; ++i) {
          const int p = part + i;
          const f32v scale = F::scale(at.scales + p * kLanes * F::kScaleBytes);
          for (int m = 0; m < M; ++m) {
            sum[m][p] = fma(to_floats(dot[m][i]), mul(scale, set1(meta[m][b].scale)), sum[m][p]);
          }
        }
      }
      for (int m = 0; m < M; ++m) x[m] += F::kTokenBytes;
    }
    for (int m = 0; m < M; ++m) {
      for (int p = 0; p < kParts; ++p) store(acc + m * kPanelRows + p * kLanes, sum[m][p]);
    }
  }

  static void products(const PanelBlocks& at, int64_t, const PreparedRows& a, const int64_t* rows, int64_t count,
                       int64_t first, int64_t blocks, float* acc) {
    const bool fetch = !at.cached && count <= kGroup;  // what is gone over again and again is at hand
    for (; count >= kGroup; count -= kGroup, rows += kGroup, acc += kGroup * kPanelRows) {
      group<kGroup>(at, a, rows, first, blocks, fetch, acc);
    }
    if (count == 1) group<1>(at, a, rows, first, blocks, fetch, acc);
    if (count == 2) group<2>(at, a, rows, first, blocks, fetch, acc);
    if (count == 3) group<3>(at, a, rows, first, blocks, fetch, acc);
  }
};

// A format also has the bytes of a token's block as arrange() lays them, and multiply(): adds kTogether parts of a
// panel, times a block of every token, to the sums of each.

struct BytesMxfp4 : ByteProduct<BytesMxfp4> {
  static constexpr int kPackedBytes = kPackedMxfp4Bytes, kScaleBytes = 1, kTokenBytes = kMxBlock, kRaise = 12;
  static constexpr int kTogether = 1;
  static constexpr int kDwords = kMxBlockBytes / 4;
  static constexpr float kUnit = 0.5f;  // codes are doubled
  static words pack(words codes) { return pack_words(codes); }
  static f32v scale(const char* p) { return e8m0_scales(reinterpret_cast<const uint8_t*>(p)); }
  static void arrange(const int8_t* codes, char* to) {
    constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // as core/packed.h orders nibbles
    for (int i = 0; i < kMxBlock; ++i) to[i] = static_cast<char>(codes[i / 8 * 8 + kOrder[i % 8]]);
  }
  template <int M>
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M][1]) {
    for (int half = 0; half < kDwords; half += 2) {
      words sum[M];
      for (int i = half; i < half + 2; ++i) {
        const words codes = load_words(w + i * 4 * kPanelRows);
        const words low = raised_e2m1(codes), high = raised_e2m1(shift_right_4(codes));
        for (int m = 0; m < M; ++m) {
          const words a = multiply_bytes(low, broadcast_word(x[m] + 8 * i));
          const words b = multiply_bytes(high, broadcast_word(x[m] + 8 * i + 4));
          sum[m] = i == half ? add_16(a, b) : add_16(sum[m], add_16(a, b));
        }
      }
      for (int m = 0; m < M; ++m) dot[m][0] = add_32(dot[m][0], multiply_16(sum[m], words_of_16(1)));
    }
  }
};

struct BytesI8 : ByteProduct<BytesI8> {
  static constexpr int kPackedBytes = kPackedInt8Bytes, kScaleBytes = 2, kTokenBytes = 2 * kMxBlock, kRaise = 128;
  static constexpr int kTogether = 1;
  static constexpr int kDwords = kMxBlock / 4;
  static constexpr float kUnit = 1.0f;
  static words pack(words codes) { return flip_word_signs(codes); }
  static f32v scale(const char* p) { return load(reinterpret_cast<const bf16*>(p)); }
  static void arrange(const int8_t* codes, char* to) {
    int16_t wide[kMxBlock];  // even places of four, then odd ones
    for (int i = 0; i < kMxBlock; i += 4) {
      for (int j = 0; j < 4; ++j) wide[i + j] = codes[i + (j % 2) * 2 + j / 2];
    }
    std::memcpy(to, wide, sizeof wide);
  }
  template <int M>
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M][1]) {
    for (int i = 0; i < kDwords; ++i) {
      const words codes = load_words(w + i * 4 * kPanelRows);
      const words even = even_bytes(codes), odd = odd_bytes(codes);
      for (int m = 0; m < M; ++m) {
        const words a = multiply_16(even, broadcast_word(x[m] + 8 * i));
        dot[m][0] = add_32(dot[m][0], add_32(a, multiply_16(odd, broadcast_word(x[m] + 8 * i + 4))));
      }
    }
  }
};

template <class F, typename X>
inline void prepare_panel(const X* x, int64_t k, const PreparedRows& to, int64_t row) {
  char* values = static_cast<char*>(to.values) + row * to.value_stride;
  BlockMeta* meta = reinterpret_cast<BlockMeta*>(to.scales + row * to.block_stride);
  for (int64_t b = 0; b < k / kMxBlock; ++b) {
    int8_t codes[kMxBlock];
    meta[b].scale = F::kUnit * quantize_block_i8(x + b * kMxBlock, codes);
    int32_t sum = 0;
    for (const int8_t code : codes) sum += code;
    meta[b].start = -F::kRaise * sum;
    F::arrange(codes, values + b * F::kTokenBytes);
  }
}
template <class F>
constexpr PrepareFn kPreparePanel = {prepare_panel<F, float>, prepare_panel<F, bf16>};
constexpr int kMetaFloats = sizeof(BlockMeta) / sizeof(float);
