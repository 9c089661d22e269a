// Products of int8 activations by panels of sixteen weight rows where there is no dot product of bytes: MXFP4's
// codes, raised by 12, are small enough for sums of four products in 16 bits; int8 weights are widened to 16 bits
// first. The integers and the sums of floats are those of panels_avx512x.inl, in the same order. Included after
// simd/panels.inl.

constexpr int kGroup = 4;  // tokens that share the decoded weights

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
      words dot[M][kParts];
      for (int m = 0; m < M; ++m) {
        for (words& start : dot[m]) start = words_of_32(meta[m][b].start);
      }
      F::template multiply<M>(at.values, x, dot);
      for (int p = 0; p < kParts; ++p) {
        const f32v scale = F::scale(at.scales + p * kLanes * F::kScaleBytes);
        for (int m = 0; m < M; ++m) {
          sum[m][p] = fma(to_floats(dot[m][p]), mul(scale, set1(meta[m][b].scale)), sum[m][p]);
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

// A format also has the bytes of a token's block as arrange() lays them, and multiply(): adds a panel's block, times
// that of every token, to the sums of each.

// Decoded, MXFP4 has twice eight dwords in a block: for each packed dword those of its low and of its high nibbles,
// which meet the codes that arrange() lays from 8 i and from 8 i + 4 on. Multiply::add<M>(load, x, dot) multiplies
// what load(i, part, low, high) gives.
template <class Multiply>
struct DecodedMxfp4 : ByteProduct<DecodedMxfp4<Multiply>> {
  static constexpr int kPackedBytes = 2 * kPackedMxfp4Bytes, kScaleBytes = 1, kTokenBytes = kMxBlock;
  static f32v scale(const char* p) { return e8m0_scales(reinterpret_cast<const uint8_t*>(p)); }
  static constexpr int place(int i, int part) { return 2 * i * 4 * kPanelRows + part * 4 * kLanes; }
  static MXMOE_INLINE void put(char* to, int i, int part, words low, words high) {
    store_words(to + place(i, part), low), store_words(to + place(i, part) + 4 * kPanelRows, high);
  }
  template <int M>
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M][kParts]) {
    const auto load = [&](int i, int part, words& low, words& high) {
      low = load_words(w + place(i, part)), high = load_words(w + place(i, part) + 4 * kPanelRows);
    };
    Multiply::template add<M>(load, x, dot);
  }
};

template <class Multiply>
struct Mxfp4 : ByteProduct<Mxfp4<Multiply>> {
  using Decoded = DecodedMxfp4<Multiply>;
  static constexpr int kPackedBytes = kPackedMxfp4Bytes, kScaleBytes = 1, kTokenBytes = kMxBlock, kRaise = 12;
  static constexpr int kDwords = kMxBlockBytes / 4;
  static constexpr float kUnit = 0.5f;  // codes are doubled
  static words pack(words codes) { return pack_words(codes); }
  static f32v scale(const char* p) { return Decoded::scale(p); }
  static void arrange(const int8_t* codes, char* to) {
    constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // as core/packed.h orders nibbles
    for (int i = 0; i < kMxBlock; ++i) to[i] = static_cast<char>(codes[i / 8 * 8 + kOrder[i % 8]]);
  }
  static MXMOE_INLINE void decode(const char* w, int i, int part, words& low, words& high) {
    const words codes = load_words(w + (i * kPanelRows + part * kLanes) * 4);
    low = raised_e2m1(codes), high = raised_e2m1(shift_right_4(codes));
  }
  template <int M>
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M][kParts]) {
    Multiply::template add<M>([&](int i, int part, words& low, words& high) { decode(w, i, part, low, high); }, x,
                              dot);
  }

  // For many tokens some blocks are decoded into the first-level cache.
  static void products(const PanelBlocks& at, int64_t panels, const PreparedRows& a, const int64_t* rows,
                       int64_t count, int64_t first, int64_t blocks, float* acc) {
    if (count <= 2 * kGroup) {
      return ByteProduct<Mxfp4>::products(at, panels, a, rows, count, first, blocks, acc);
    }
    alignas(64) char decoded[kChunk * Decoded::kPackedBytes];
    for (int64_t b = 0; b < blocks; b += kChunk) {
      const int64_t some = blocks - b < kChunk ? blocks - b : kChunk;
      for (int64_t block = 0; block < some; ++block) {
        const char* from = at.values_at(0, b + block);
        for (int i = 0; i < kDwords; ++i) {
          if (!at.cached) fetch_ahead(from + i * 4 * kPanelRows, at.distance);
          for (int part = 0; part < kParts; ++part) {
            words low, high;
            decode(from, i, part, low, high);
            Decoded::put(decoded + block * Decoded::kPackedBytes, i, part, low, high);
          }
        }
      }
      const PanelBlocks chunk{decoded, at.scales_at(0, b), Decoded::kPackedBytes, at.scale_block, 0, 0, true};
      Decoded::products(chunk, 1, a, rows, count, first + b, some, acc);
    }
  }
};

// Of two packed dwords come eight products a lane, of 24 * 127 at most: their sum fits 16 bits.
struct BytePairs {
  template <int M, class Load>
  static MXMOE_INLINE void add(const Load& load, const char* const (&x)[M], words (&dot)[M][kParts]) {
    for (int half = 0; half < kMxBlock / 8; half += 2) {
      words sum[M][kParts];
      for (int i = half; i < half + 2; ++i) {
        words low[kParts], high[kParts];
        for (int p = 0; p < kParts; ++p) load(i, p, low[p], high[p]);
        for (int m = 0; m < M; ++m) {
          const words x_low = broadcast_word(x[m] + 8 * i), x_high = broadcast_word(x[m] + 8 * i + 4);
          for (int p = 0; p < kParts; ++p) {
            const words both = add_16(multiply_bytes(low[p], x_low), multiply_bytes(high[p], x_high));
            sum[m][p] = i == half ? both : add_16(sum[m][p], both);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        for (int p = 0; p < kParts; ++p) dot[m][p] = add_32(dot[m][p], multiply_16(sum[m][p], words_of_16(1)));
      }
    }
  }
};
using BytesMxfp4 = Mxfp4<BytePairs>;

struct BytesI8 : ByteProduct<BytesI8> {
  static constexpr int kPackedBytes = kPackedInt8Bytes, kScaleBytes = 2, kTokenBytes = 2 * kMxBlock, kRaise = 128;
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
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M][kParts]) {
    for (int i = 0; i < kDwords; ++i) {
      words even[kParts], odd[kParts];
      for (int p = 0; p < kParts; ++p) {
        const words codes = load_words(w + (i * kPanelRows + p * kLanes) * 4);
        even[p] = even_bytes(codes), odd[p] = odd_bytes(codes);
      }
      for (int m = 0; m < M; ++m) {
        const words x_even = broadcast_word(x[m] + 8 * i), x_odd = broadcast_word(x[m] + 8 * i + 4);
        for (int p = 0; p < kParts; ++p) {
          const words both = add_32(multiply_16(even[p], x_even), multiply_16(odd[p], x_odd));
          dot[m][p] = add_32(dot[m][p], both);
        }
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
