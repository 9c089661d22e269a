// Products of float32 activations (or bfloat16 held in float32) by panels of sixteen weight rows, with fused
// multiply-adds: where there are no bfloat16 dot products, or slow ones. A block's products are summed from zero,
// then scaled and added. For few tokens weights are decoded in registers, as they come from memory; for many, a block
// of a tile is decoded into the first-level cache and used for all. Included after simd/panels.inl.

constexpr int kFloatGroup = 6;                                    // tokens that share a load of the decoded weights
constexpr int kFloatFew = kLanes == kPanelRows ? 6 : 4;           // tokens that share a decoding in registers
constexpr int kFloatVectors = kLanes == kPanelRows ? 4 : kParts;  // of a tile: 24 sums in 32 registers, or 12 in 16

template <class F>
struct FloatProduct {
  static constexpr int kPanels = kFloatVectors / kParts;

  // Calls use(k, weight) for the values of K of a part of a panel's block, in order.
  template <class Use>
  static MXMOE_INLINE void each(const char* part, const Use& use) {
    constexpr int kValues = kMxBlock / F::kDwords;
    for (int i = 0; i < F::kDwords; ++i) {
      F::each_of(load_words(part + i * 4 * kPanelRows), [&](int j, f32v weight) { use(i * kValues + j, weight); });
    }
  }

  // sum += dot, times the scale if there is one.
  static MXMOE_INLINE void add_block(float* sum, f32v dot, f32v scale) {
    store(sum, F::kScaleBytes > 0 ? fma(dot, scale, load(sum)) : add(load(sum), dot));
  }

  // B blocks of one panel times M tokens, from memory.
  template <int M, int B>
  static MXMOE_INLINE void few_blocks(const PanelBlocks& at, int64_t panel, const float* const (&x)[M], int64_t block,
                                      float* acc) {
    constexpr int kValues = kMxBlock / F::kDwords;
    f32v dot[B][M][kParts];
    for (auto& of_block : dot) {
      for (auto& of_token : of_block) {
        for (f32v& part : of_token) part = zero();
      }
    }
    for (int i = 0; i < F::kDwords; ++i) {
      for (int b = 0; b < B; ++b) {
        const char* line = at.values_at(panel, block + b) + i * 4 * kPanelRows;
        // One line beside each that is read, held there: bursts keep loads waiting.
        if (!at.cached) {
          fetch_ahead(line, at.distance);
          if (F::kScaleBytes > 0 && i + 1 == F::kDwords) fetch_ahead(line + 4 * kPanelRows, at.distance);
        }
        const int64_t k = (block + b) * kMxBlock + i * kValues;
        for (int p = 0; p < kParts; ++p) {
          F::each_of(load_words(line + p * 4 * kLanes), [&](int j, f32v weight) {
            for (int m = 0; m < M; ++m) dot[b][m][p] = fma(set1(x[m][k + j]), weight, dot[b][m][p]);
          });
        }
      }
    }
    for (int b = 0; b < B; ++b) {
      for (int p = 0; p < kParts; ++p) {
        const f32v scale = F::scale(at.scales_at(panel, block + b) + p * kLanes * F::kScaleBytes);
        for (int m = 0; m < M; ++m) add_block(acc + m * kTileRows<F> + p * kLanes, dot[b][m][p], scale);
      }
    }
  }

  // One panel times M tokens. One or two sums at a time would wait for each other: then there are some blocks of
  // them.
  template <int M>
  static void few(const PanelBlocks& at, int64_t panel, const float* const* rows, int64_t blocks, float* acc) {
    constexpr int kBlocks = M * kParts < 4 ? 4 / (M * kParts) : 1;
    const float* x[M];
    for (int m = 0; m < M; ++m) x[m] = rows[m];
    int64_t b = 0;
    for (; b + kBlocks <= blocks; b += kBlocks) few_blocks<M, kBlocks>(at, panel, x, b, acc);
    for (; b < blocks; ++b) few_blocks<M, 1>(at, panel, x, b, acc);
  }

  // A tile's block, decoded: [k][vector] vectors, and the scales.
  struct alignas(64) Decoded {
    float weights[kMxBlock * kFloatVectors * kLanes];
    float scales[kFloatVectors * kLanes];
  };

  template <int V>
  static void decode(const PanelBlocks& at, int64_t panel, int64_t block, Decoded& to) {
    for (int v = 0; v < V; ++v) {
      const int64_t of = panel + v / kParts, lane = v % kParts * kLanes;
      each(at.values_at(of, block) + lane * 4,
           [&](int k, f32v weight) { store(to.weights + (k * V + v) * kLanes, weight); });
      store(to.scales + v * kLanes, F::scale(at.scales_at(of, block) + lane * F::kScaleBytes));
    }
  }

  // A decoded block of V vectors times M tokens, whose values of K from `k` on it meets. A function of its own: what
  // decoding holds in registers would push sums out of them.
  template <int M, int V>
  MXMOE_NOINLINE static void group(const Decoded& block, const float* const* rows, int64_t k, float* acc) {
    const float* x[M];
    for (int m = 0; m < M; ++m) x[m] = rows[m];
    f32v dot[M][V];
    for (auto& of_token : dot) {
      for (f32v& part : of_token) part = zero();
    }
    for (int i = 0; i < kMxBlock; ++i) {
      f32v w[V];
      for (int v = 0; v < V; ++v) w[v] = load(block.weights + (i * V + v) * kLanes);
      for (int m = 0; m < M; ++m) {
        const f32v value = set1(x[m][k + i]);
        for (int v = 0; v < V; ++v) dot[m][v] = fma(value, w[v], dot[m][v]);
      }
    }
    for (int v = 0; v < V; ++v) {
      const f32v scale = load(block.scales + v * kLanes);
      for (int m = 0; m < M; ++m) add_block(acc + m * kTileRows<F> + v * kLanes, dot[m][v], scale);
    }
  }
  template <int M, int V>
  static void next_group(const Decoded& block, const float* const* rows, int64_t count, int64_t k, float* acc) {
    if (count == M) return group<M, V>(block, rows, k, acc);
    if constexpr (M > 1) next_group<M - 1, V>(block, rows, count, k, acc);
  }

  // The activations of the tokens that come next, which may lie far from the last.
  static void fetch_tokens(const float* const* rows, int64_t count, int64_t k) {
    for (int64_t m = 0; m < count && m < kFloatGroup; ++m) {
      for (int i = 0; i < kMxBlock; i += 64 / 4) prefetch(rows[m] + k + i);
    }
  }

  // A part of the block that is decoded next: `part` of `parts`. Behind a tile's last comes the next tile's first.
  template <int V>
  static void fetch_block(const PanelBlocks& at, int64_t panel, int64_t block, bool last, int64_t part,
                          int64_t parts) {
    if (at.cached) return;
    const int64_t step = (at.value_block / parts + 63) / 64 * 64, begin = part * step;
    for (int64_t q = 0; q < V / kParts; ++q) {
      const char* next = last ? at.values_at(panel + V / kParts + q, 0) : at.values_at(panel + q, block);
      for (int64_t i = begin; i < begin + step && i < at.value_block; i += 64) prefetch(next + i);
    }
  }

  // Some panels, kPanels of them or one, times many tokens.
  template <int V>
  static void many(const PanelBlocks& at, int64_t panel, const float* const* rows, int64_t count, int64_t blocks,
                   float* acc) {
    Decoded decoded;
    const int64_t groups = (count + kFloatGroup - 1) / kFloatGroup;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t k = b * kMxBlock;
      const bool last = b + 1 == blocks;
      decode<V>(at, panel, b, decoded);
      for (int64_t m = 0, g = 0; m < count; ++g) {
        // Few products at a time wait for each other: what would be left with few is halved before.
        const int64_t left = count - m;
        const bool halves = left > kFloatGroup && left < 2 * kFloatGroup;
        const int64_t taken = halves ? (left + 1) / 2 : left < kFloatGroup ? left : kFloatGroup;
        const int64_t next = m + taken;
        if (next < count) {
          fetch_tokens(rows + next, count - next, k);
        } else if (!last) {
          fetch_tokens(rows, count, k + kMxBlock);
        }
        fetch_block<V>(at, panel, b + 1, last, g, groups);
        next_group<kFloatGroup, V>(decoded, rows + m, taken, k, acc + m * kTileRows<F>);
        m = next;
      }
    }
  }

  template <int M>
  static void next_few(const PanelBlocks& at, int64_t panel, const float* const* rows, int64_t count, int64_t blocks,
                       float* acc) {
    if (count == M) return few<M>(at, panel, rows, blocks, acc);
    if constexpr (M > 1) next_few<M - 1>(at, panel, rows, count, blocks, acc);
  }

  static void products(const PanelBlocks& at, int64_t panels, const PreparedRows& a, const int64_t* order,
                       int64_t count, int64_t first, int64_t blocks, float* acc) {
    const float* rows[kTileTokens];
    for (int64_t m = 0; m < count; ++m) {
      const char* row = static_cast<const char*>(a.values) + order[m] * a.value_stride;
      rows[m] = reinterpret_cast<const float*>(row) + first * kMxBlock;
    }
    if (count > kFloatFew && panels == kPanels) return many<kFloatVectors>(at, 0, rows, count, blocks, acc);
    for (int64_t p = 0; p < panels; ++p) {
      if (count > kFloatFew) {
        many<kParts>(at, p, rows, count, blocks, acc + p * kPanelRows);
      } else {
        next_few<kFloatFew>(at, p, rows, count, blocks, acc + p * kPanelRows);
      }
    }
  }
};

// Each format: each_of(dwords, use) calls use(j, weight) for the values of K that the dwords of a part hold.

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
