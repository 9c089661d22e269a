// Products of int8 activations by panels of sixteen weight rows where there is no dot product of bytes: MXFP4's
// codes, raised by 12, are small enough for sums of four products in 16 bits; int8 weights are widened to 16 bits
// first. The integers and the sums of floats are those of panels_avx512x.inl, in the same order. Rows as stored are
// packed on the way, some blocks at a time. Included inside a kernel's namespace and target region, after
// simd/prepare.inl.

constexpr int kParts = kPanelRows / kLanes;  // vectors of a panel
constexpr int kGroup = 4;                    // tokens that share the decoded weights
constexpr int kTileTokens = 64;              // tokens of one pass over a panel, which stays in the cache
constexpr int kChunk = 8;                    // blocks packed at a time

// What activations of a block have beside their codes.
struct BlockMeta {
  float scale;
  int32_t start;  // -raise * sum of the codes: takes the raise of the weights off again
};

// A format has the bytes of a packed block and of its scales, the bytes of a token's block as arrange() lays them,
// and multiply(): adds a part of a panel, times a block of every token, to the sums of each.

struct BytesMxfp4 {
  static constexpr int kPackedBytes = kPackedMxfp4Bytes, kScaleBytes = 1, kTokenBytes = kMxBlock, kRaise = 12;
  static constexpr int kDwords = kMxBlockBytes / 4;
  static constexpr float kUnit = 0.5f;  // codes are doubled
  static uint32_t pack(uint32_t codes) { return pack_codes(codes); }
  static f32v scale(const char* p) { return e8m0_scales(reinterpret_cast<const uint8_t*>(p)); }
  static void arrange(const int8_t* codes, char* to) {
    constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // as core/packed.h orders nibbles
    for (int i = 0; i < kMxBlock; ++i) to[i] = static_cast<char>(codes[i / 8 * 8 + kOrder[i % 8]]);
  }
  template <int M>
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M]) {
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
      for (int m = 0; m < M; ++m) dot[m] = add_32(dot[m], multiply_16(sum[m], words_of_16(1)));
    }
  }
};

struct BytesI8 {
  static constexpr int kPackedBytes = kPackedInt8Bytes, kScaleBytes = 2, kTokenBytes = 2 * kMxBlock, kRaise = 128;
  static constexpr int kDwords = kMxBlock / 4;
  static constexpr float kUnit = 1.0f;
  static uint32_t pack(uint32_t codes) { return flip_signs(codes); }
  static f32v scale(const char* p) { return load(reinterpret_cast<const bf16*>(p)); }
  static void arrange(const int8_t* codes, char* to) {
    int16_t wide[kMxBlock];  // even places of four, then odd ones
    for (int i = 0; i < kMxBlock; i += 4) {
      for (int j = 0; j < 4; ++j) wide[i + j] = codes[i + (j % 2) * 2 + j / 2];
    }
    std::memcpy(to, wide, sizeof wide);
  }
  template <int M>
  static MXMOE_INLINE void multiply(const char* w, const char* const (&x)[M], words (&dot)[M]) {
    for (int i = 0; i < kDwords; ++i) {
      const words codes = load_words(w + i * 4 * kPanelRows);
      const words even = even_bytes(codes), odd = odd_bytes(codes);
      for (int m = 0; m < M; ++m) {
        const words a = multiply_16(even, broadcast_word(x[m] + 8 * i));
        dot[m] = add_32(dot[m], add_32(a, multiply_16(odd, broadcast_word(x[m] + 8 * i + 4))));
      }
    }
  }
};

// Blocks of a packed panel, from one on.
struct PanelBlocks {
  const char *values, *scales;
  int64_t value_block, scale_block;  // bytes from block to block
};

// Blocks [first, first + blocks) of a packed panel times M tokens.
template <class F, int M>
inline void multiply_panel(PanelBlocks at, const PreparedRows& a, const int64_t* rows, int64_t first, int64_t blocks,
                           bool fetch, float* acc) {
  constexpr int kAhead = 4096;
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
      for (int i = 0; i <= F::kPackedBytes; i += 64) prefetch(at.values + kAhead + i);
    }
    for (int p = 0; p < kParts; ++p) {
      words dot[M];
      for (int m = 0; m < M; ++m) dot[m] = words_of_32(meta[m][b].start);
      F::template multiply<M>(at.values + p * kLanes * 4, x, dot);
      const f32v scale = F::scale(at.scales + p * kLanes * F::kScaleBytes);
      for (int m = 0; m < M; ++m) {
        sum[m][p] = fma(to_floats(dot[m]), mul(scale, set1(meta[m][b].scale)), sum[m][p]);
      }
    }
    for (int m = 0; m < M; ++m) x[m] += F::kTokenBytes;
  }
  for (int m = 0; m < M; ++m) {
    for (int p = 0; p < kParts; ++p) store(acc + m * kPanelRows + p * kLanes, sum[m][p]);
  }
}

template <class F>
inline void multiply_tokens(const PanelBlocks& at, const PreparedRows& a, const int64_t* rows, int64_t count,
                            int64_t first, int64_t blocks, float* acc) {
  const bool fetch = count <= kGroup;  // what is gone over again and again is at hand
  for (; count >= kGroup; count -= kGroup, rows += kGroup, acc += kGroup * kPanelRows) {
    multiply_panel<F, kGroup>(at, a, rows, first, blocks, fetch, acc);
  }
  if (count == 1) multiply_panel<F, 1>(at, a, rows, first, blocks, fetch, acc);
  if (count == 2) multiply_panel<F, 2>(at, a, rows, first, blocks, fetch, acc);
  if (count == 3) multiply_panel<F, 3>(at, a, rows, first, blocks, fetch, acc);
}

// Some blocks of sixteen rows, packed. Rows past the last repeat it: they are computed and not stored.
template <class F>
struct alignas(64) PackedChunk {
  static constexpr int kBlockScales = F::kScaleBytes * kPanelRows;
  char values[kChunk * F::kPackedBytes];
  char scales[kChunk * kBlockScales];

  PanelBlocks blocks() const { return {values, scales, F::kPackedBytes, kBlockScales}; }
  void pack(const WeightRows& w, int64_t n, int64_t n_end, int64_t first, int64_t blocks) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const int64_t row = n + r < n_end ? n + r : n_end - 1;
      const char* from = static_cast<const char*>(w.values) + row * w.value_stride + first * F::kDwords * 4;
      const char* of = static_cast<const char*>(w.scales) + row * w.scale_stride + first * F::kScaleBytes;
      for (int64_t i = 0; i < blocks * F::kDwords; ++i) {
        uint32_t dword;
        std::memcpy(&dword, from + i * 4, sizeof dword);
        dword = F::pack(dword);
        std::memcpy(values + (i * kPanelRows + r) * 4, &dword, sizeof dword);
      }
      for (int64_t b = 0; b < blocks; ++b) {
        std::memcpy(scales + (b * kPanelRows + r) * F::kScaleBytes, of + b * F::kScaleBytes, F::kScaleBytes);
      }
    }
  }
};

// The products of the rows listed in `rows` (of all, if that is null) with weight rows [n_begin, n_end), a panel and
// up to kTileTokens tokens at a time, handed to emit(first token, tokens, first weight row, weight rows, results)
// with kPanelRows results a token. n_begin is a multiple of 16.
template <class F, class Emit>
inline void for_each_panel(const PreparedRows& a, const int64_t* rows, int64_t num_rows, const WeightRows& w,
                           int64_t n_begin, int64_t n_end, int64_t k, const Emit& emit) {
  PackedChunk<F> chunk;
  alignas(64) float acc[kTileTokens * kPanelRows];
  int64_t order[kTileTokens];
  const int64_t blocks = k / kMxBlock;
  for (int64_t n = n_begin; n < n_end; n += kPanelRows) {
    const int64_t width = n_end - n < kPanelRows ? n_end - n : kPanelRows;
    for (int64_t m = 0; m < num_rows; m += kTileTokens) {
      const int64_t count = num_rows - m < kTileTokens ? num_rows - m : kTileTokens;
      for (int64_t i = 0; i < count; ++i) order[i] = rows == nullptr ? m + i : rows[m + i];
      std::memset(acc, 0, static_cast<size_t>(count) * kPanelRows * sizeof(float));
      if (w.packed) {
        const char* values = static_cast<const char*>(w.values) + n / kPanelRows * w.value_stride;
        const char* scales = static_cast<const char*>(w.scales) + n / kPanelRows * w.scale_stride;
        multiply_tokens<F>({values, scales, w.value_block, w.scale_block}, a, order, count, 0, blocks, acc);
      }
      for (int64_t b = 0; !w.packed && b < blocks; b += kChunk) {
        const int64_t some = blocks - b < kChunk ? blocks - b : kChunk;
        chunk.pack(w, n, n_end, b, some);
        multiply_tokens<F>(chunk.blocks(), a, order, count, b, some, acc);
      }
      emit(m, count, n, width, acc);
    }
  }
}

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
