// What products by panels of sixteen weight rows share where there are no dot products of bytes or bfloat16
// (panels_bytes.inl, panels_decoded.inl): rows as stored are packed on the way, some blocks at a time, and every
// output sees the blocks of K in order, whatever the number of tokens and the layout of the weights. Included inside
// a kernel's namespace and target region, after simd/prepare.inl.

constexpr int kParts = kPanelRows / kLanes;  // vectors of a panel
constexpr int kTileTokens = 64;              // tokens of one pass over a tile, whose sums stay in the cache
constexpr int kChunk = 8;                    // blocks packed at a time

// A format says how many panels make a tile, the bytes of a packed block and of its scales, how dwords as stored
// become packed ones, and `products`: adds blocks of a tile times some tokens to their sums.

// Blocks of one or more panels, from one on.
struct PanelBlocks {
  const char *values, *scales;
  int64_t value_block, scale_block;  // bytes from block to block
  int64_t value_panel, scale_panel;  // bytes from panel to panel
  bool cached;                       // else in memory, to be fetched ahead
  FetchDistance distance = fetch_distance(4096);

  const char* values_at(int64_t panel, int64_t block) const {
    return values + panel * value_panel + block * value_block;
  }
  const char* scales_at(int64_t panel, int64_t block) const {
    return scales + panel * scale_panel + block * scale_block;
  }
};

// Some blocks of a tile's rows, packed. Rows past the last repeat it: they are computed and not stored. Past the end
// of a row come zeros.
template <class F>
struct alignas(64) PackedChunk {
  static constexpr int kBlockScales = F::kScaleBytes * kPanelRows;
  static constexpr int64_t kPanelValues = int64_t{kChunk} * F::kPackedBytes;
  static constexpr int64_t kPanelScales = int64_t{kChunk} * kBlockScales;
  char values[F::kPanels * kPanelValues];
  char scales[F::kPanels * kPanelScales + 1];  // one more: bfloat16 has none

  PanelBlocks blocks() const {
    return {values, scales, F::kPackedBytes, kBlockScales, kPanelValues, kPanelScales, true};
  }
  // Dwords of kLanes rows side by side; `bytes` of each row exist.
  static void transpose_dwords(const char* const (&rows)[kLanes], int64_t bytes, char* to) {
    f32v lanes[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const auto* from = reinterpret_cast<const float*>(rows[r]);
      if (bytes >= 4 * kLanes) {
        lanes[r] = load(from);
      } else {
        float some[kLanes] = {};
        if (bytes > 0) std::memcpy(some, from, static_cast<size_t>(bytes));
        lanes[r] = load(some);
      }
    }
    transpose(lanes);
    for (int i = 0; i < kLanes; ++i) store_words(to + i * 4 * kPanelRows, F::pack(words_of_floats(lanes[i])));
  }
  void pack_panel(const WeightRows& w, int64_t panel, int64_t n, int64_t n_end, int64_t first, int64_t blocks,
                  int64_t k) {
    char* to = values + panel * kPanelValues;
    const int64_t skipped = first * F::kDwords * 4, dwords = blocks * F::kDwords;
    const int64_t bytes = k * F::kDwords * 4 / kMxBlock - skipped;
    for (int part = 0; part < kParts; ++part) {
      const char* rows[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const int64_t row = n + part * kLanes + r;
        rows[r] = static_cast<const char*>(w.values) + (row < n_end ? row : n_end - 1) * w.value_stride + skipped;
      }
      for (int64_t i = 0; i < dwords; i += kLanes) {
        transpose_dwords(rows, bytes - i * 4, to + (i * kPanelRows + part * kLanes) * 4);
        for (const char*& row : rows) row += 4 * kLanes;
      }
    }
    for (int64_t r = 0; r < kPanelRows && F::kScaleBytes > 0; ++r) {
      const int64_t row = n + r < n_end ? n + r : n_end - 1;
      const char* of = static_cast<const char*>(w.scales) + row * w.scale_stride + first * F::kScaleBytes;
      for (int64_t b = 0; b < blocks; ++b) {
        std::memcpy(scales + panel * kPanelScales + (b * kPanelRows + r) * F::kScaleBytes, of + b * F::kScaleBytes,
                    F::kScaleBytes);
      }
    }
  }
};

// The products of the rows listed in `rows` (of all, if that is null) with weight rows [n_begin, n_end), a tile of
// F::kPanels panels and up to kTileTokens tokens at a time, handed to emit(first token, tokens, first weight row,
// weight rows, results) with kTileRows<F> results a token. n_begin is a multiple of 16.
template <class F>
constexpr int kTileRows = F::kPanels * kPanelRows;

template <class F, class Emit>
inline void for_each_panel(const PreparedRows& a, const int64_t* rows, int64_t num_rows, const WeightRows& w,
                           int64_t n_begin, int64_t n_end, int64_t k, const Emit& emit) {
  PackedChunk<F> chunk;
  alignas(64) float acc[kTileTokens * kTileRows<F>];
  int64_t order[kTileTokens];
  const int64_t blocks = (k + kMxBlock - 1) / kMxBlock;
  for (int64_t m = 0; m < num_rows; m += kTileTokens) {
    const int64_t count = num_rows - m < kTileTokens ? num_rows - m : kTileTokens;
    for (int64_t i = 0; i < count; ++i) order[i] = rows == nullptr ? m + i : rows[m + i];
    for (int64_t n = n_begin; n < n_end; n += kTileRows<F>) {
      const int64_t width = n_end - n < kTileRows<F> ? n_end - n : kTileRows<F>;
      const int64_t panels = (width + kPanelRows - 1) / kPanelRows;
      std::memset(acc, 0, static_cast<size_t>(count) * kTileRows<F> * sizeof(float));
      if (w.packed) {
        const char* values = static_cast<const char*>(w.values) + n / kPanelRows * w.value_stride;
        const char* scales = static_cast<const char*>(w.scales) + n / kPanelRows * w.scale_stride;
        F::products({values, scales, w.value_block, w.scale_block, w.value_stride, w.scale_stride, false}, panels, a,
                    order, count, 0, blocks, acc);
      }
      for (int64_t b = 0; !w.packed && b < blocks; b += kChunk) {
        const int64_t some = blocks - b < kChunk ? blocks - b : kChunk;
        for (int64_t p = 0; p < panels; ++p) chunk.pack_panel(w, p, n + p * kPanelRows, n_end, b, some, k);
        F::products(chunk.blocks(), panels, a, order, count, b, some, acc);
      }
      emit(m, count, n, width, acc);
    }
  }
}
