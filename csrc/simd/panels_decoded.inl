// Products of float32 activations, and of bfloat16 ones where there is no fast product of those, by panels of sixteen
// weight rows; panels_floats.inl and panels_words.inl have the formats. A block's products are summed by themselves,
// then scaled and added. For few tokens weights are decoded in registers, as they come from memory; for many, a block
// of a tile is decoded into the first-level cache and used for all. Included after simd/panels.inl.

constexpr int kVectorBytes = 4 * kLanes;
constexpr int kDecodedGroup = 6;                                    // tokens that share a load of the decoded weights
constexpr int kDecodedFew = kLanes == kPanelRows ? 6 : 4;           // tokens that share a decoding in registers
constexpr int kDecodedVectors = kLanes == kPanelRows ? 4 : kParts;  // of a tile: 24 sums in 32 registers, or 12 in 16

// A token's activations: kSteps dwords a block, and what a block has beside them.
struct TokenRow {
  const char* values;
  const BlockMeta* meta;
};

// Arithmetic A: Sum, what a block's products are summed in, and the weights as they are multiplied; kSteps, the
// dwords of a token's block, each of which meets one vector of a part; broadcast(), such a dword for all lanes;
// weight_at() and put_weight(), to keep a weight; start(meta), a sum of nothing; add_product(sum, values, weight);
// and finish<kScaled>(sum, dot, scale, meta), the sum of the blocks before and this one. A format F has, beside what
// panels.inl asks for, each_of(dwords, use), which calls use(j, weight) for the steps that some packed dwords hold,
// in order.
template <class F, class A>
struct DecodedProduct {
  using Sum = typename A::Sum;
  static constexpr int kSteps = A::kSteps;
  static constexpr int kPanels = kDecodedVectors / kParts;

  // Calls use(step, weight) for all of a part of a panel's block, in order.
  template <class Use>
  static MXMOE_INLINE void each(const char* part, const Use& use) {
    constexpr int kOfDword = kSteps / F::kDwords;
    for (int i = 0; i < F::kDwords; ++i) {
      F::each_of(load_words(part + i * 4 * kPanelRows), [&](int j, Sum weight) { use(i * kOfDword + j, weight); });
    }
  }

  // B blocks of one panel times M tokens, from memory.
  template <int M, int B>
  static MXMOE_INLINE void few_blocks(const PanelBlocks& at, int64_t panel, const TokenRow (&x)[M], int64_t block,
                                      float* acc) {
    constexpr int kOfDword = kSteps / F::kDwords;
    Sum dot[B][M][kParts];
    for (int b = 0; b < B; ++b) {
      for (int m = 0; m < M; ++m) {
        for (auto& part : dot[b][m]) part = A::start(x[m].meta + block + b);
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
        const int64_t step = (block + b) * kSteps + i * kOfDword;
        for (int p = 0; p < kParts; ++p) {
          F::each_of(load_words(line + p * 4 * kLanes), [&](int j, Sum weight) {
            for (int m = 0; m < M; ++m) {
              dot[b][m][p] = A::add_product(dot[b][m][p], A::broadcast(x[m].values + (step + j) * 4), weight);
            }
          });
        }
      }
    }
    for (int b = 0; b < B; ++b) {
      for (int p = 0; p < kParts; ++p) {
        const f32v scale = F::scale(at.scales_at(panel, block + b) + p * kLanes * F::kScaleBytes);
        for (int m = 0; m < M; ++m) {
          float* sum = acc + m * kTileRows<F> + p * kLanes;
          store(sum, A::template finish<(F::kScaleBytes > 0)>(load(sum), dot[b][m][p], scale, x[m].meta + block + b));
        }
      }
    }
  }

  // One panel times M tokens. One or two sums at a time would wait for each other: then there are some blocks of
  // them.
  template <int M>
  static void few(const PanelBlocks& at, int64_t panel, const TokenRow* rows, int64_t blocks, float* acc) {
    constexpr int kBlocks = M * kParts < 4 ? 4 / (M * kParts) : 1;
    TokenRow x[M];
    for (int m = 0; m < M; ++m) x[m] = rows[m];
    int64_t b = 0;
    for (; b + kBlocks <= blocks; b += kBlocks) few_blocks<M, kBlocks>(at, panel, x, b, acc);
    for (; b < blocks; ++b) few_blocks<M, 1>(at, panel, x, b, acc);
  }

  // A tile's block, decoded: [step][vector] vectors, and the scales.
  struct alignas(64) Decoded {
    char weights[kSteps * kDecodedVectors * kVectorBytes];
    float scales[kDecodedVectors * kLanes];
  };

  template <int V>
  static void decode(const PanelBlocks& at, int64_t panel, int64_t block, Decoded& to) {
    for (int v = 0; v < V; ++v) {
      const int64_t of = panel + v / kParts, lane = v % kParts * kLanes;
      each(at.values_at(of, block) + lane * 4,
           [&](int step, Sum weight) { A::put_weight(to.weights + (step * V + v) * kVectorBytes, weight); });
      store(to.scales + v * kLanes, F::scale(at.scales_at(of, block) + lane * F::kScaleBytes));
    }
  }

  template <int M, int V>
  static MXMOE_INLINE void multiply_step(const Decoded& decoded, const char* const (&x)[M], int i, Sum (&dot)[M][V]) {
    Sum w[V];
    for (int v = 0; v < V; ++v) w[v] = A::weight_at(decoded.weights + (i * V + v) * kVectorBytes);
    for (int m = 0; m < M; ++m) {
      const auto values = A::broadcast(x[m] + i * 4);
      for (int v = 0; v < V; ++v) dot[m][v] = A::add_product(dot[m][v], values, w[v]);
    }
  }
  // Without a loop: in one, GCC keeps sums of integers in memory.
  template <int M, int V, int... i>
  static MXMOE_INLINE void multiply_steps(const Decoded& decoded, const char* const (&x)[M], Sum (&dot)[M][V],
                                          std::integer_sequence<int, i...>) {
    (multiply_step<M, V>(decoded, x, i, dot), ...);
  }

  // A decoded block of V vectors times M tokens, whose block of the same number it meets. A function of its own: what
  // decoding holds in registers would push sums out of them.
  template <int M, int V>
  MXMOE_NOINLINE static void group(const Decoded& decoded, const TokenRow* rows, int64_t block, float* acc) {
    const char* x[M];
    Sum dot[M][V];
    for (int m = 0; m < M; ++m) {
      x[m] = rows[m].values + block * kSteps * 4;
      for (int v = 0; v < V; ++v) dot[m][v] = A::start(rows[m].meta + block);
    }
    multiply_steps<M, V>(decoded, x, dot, std::make_integer_sequence<int, kSteps>());
    for (int v = 0; v < V; ++v) {
      const f32v scale = load(decoded.scales + v * kLanes);
      for (int m = 0; m < M; ++m) {
        float* sum = acc + m * kTileRows<F> + v * kLanes;
        store(sum, A::template finish<(F::kScaleBytes > 0)>(load(sum), dot[m][v], scale, rows[m].meta + block));
      }
    }
  }
  template <int M, int V>
  static void next_group(const Decoded& decoded, const TokenRow* rows, int64_t count, int64_t block, float* acc) {
    if (count == M) return group<M, V>(decoded, rows, block, acc);
    if constexpr (M > 1) next_group<M - 1, V>(decoded, rows, count, block, acc);
  }

  // The activations of the tokens that come next, which may lie far from the last.
  static void fetch_tokens(const TokenRow* rows, int64_t count, int64_t block) {
    for (int64_t m = 0; m < count && m < kDecodedGroup; ++m) {
      for (int i = 0; i < kSteps * 4; i += 64) prefetch(rows[m].values + block * kSteps * 4 + i);
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
  static void many(const PanelBlocks& at, int64_t panel, const TokenRow* rows, int64_t count, int64_t blocks,
                   float* acc) {
    Decoded decoded;
    const int64_t groups = (count + kDecodedGroup - 1) / kDecodedGroup;
    for (int64_t b = 0; b < blocks; ++b) {
      const bool last = b + 1 == blocks;
      decode<V>(at, panel, b, decoded);
      for (int64_t m = 0, g = 0; m < count; ++g) {
        // Few products at a time wait for each other: what would be left with few is halved before.
        const int64_t left = count - m;
        const bool halves = left > kDecodedGroup && left < 2 * kDecodedGroup;
        const int64_t taken = halves ? (left + 1) / 2 : left < kDecodedGroup ? left : kDecodedGroup;
        const int64_t next = m + taken;
        if (next < count) {
          fetch_tokens(rows + next, count - next, b);
        } else if (!last) {
          fetch_tokens(rows, count, b + 1);
        }
        fetch_block<V>(at, panel, b + 1, last, g, groups);
        next_group<kDecodedGroup, V>(decoded, rows + m, taken, b, acc + m * kTileRows<F>);
        m = next;
      }
    }
  }

  template <int M>
  static void next_few(const PanelBlocks& at, int64_t panel, const TokenRow* rows, int64_t count, int64_t blocks,
                       float* acc) {
    if (count == M) return few<M>(at, panel, rows, blocks, acc);
    if constexpr (M > 1) next_few<M - 1>(at, panel, rows, count, blocks, acc);
  }

  static void products(const PanelBlocks& at, int64_t panels, const PreparedRows& a, const int64_t* order,
                       int64_t count, int64_t first, int64_t blocks, float* acc) {
    TokenRow rows[kTileTokens];
    for (int64_t m = 0; m < count; ++m) {
      rows[m].values = static_cast<const char*>(a.values) + order[m] * a.value_stride + first * kSteps * 4;
      rows[m].meta = reinterpret_cast<const BlockMeta*>(a.scales + order[m] * a.block_stride) + first;
    }
    if (count > kDecodedFew && panels == kPanels) return many<kDecodedVectors>(at, 0, rows, count, blocks, acc);
    for (int64_t p = 0; p < panels; ++p) {
      if (count > kDecodedFew) {
        many<kParts>(at, p, rows, count, blocks, acc + p * kPanelRows);
      } else {
        next_few<kDecodedFew>(at, p, rows, count, blocks, acc + p * kPanelRows);
      }
    }
  }
};
