// Matrix products by panels: sixteen weight rows in the lanes of a vector, so that nothing is summed across lanes.
// Every output has one accumulator that sees the blocks of K in order, whatever the number of tokens and the layout
// of the weights, so its bits depend on its own row alone. Few tokens read the weights once, straight from memory;
// for many, a chunk of two panels is decoded into the first-level cache, while the first of them are multiplied, and
// used for all the others. Included inside the namespace and target region of avx512x or of avx512vnni, before one of
// the files of formats: panels_avx512x_bf16.inl, panels_avx512vnni_int8.inl, panels_avx512vnni_int16.inl.

constexpr int kTileRows = 2 * kPanelRows;  // weight rows of one pass, and the row stride of its results
constexpr int kTileTokens = 96;            // tokens of one pass: what they sum up stays in the second-level cache

// --- rows as stored: sixteen bytes of each of sixteen rows, turned into four vectors of one dword a row ---

struct Dwords {
  __m512i dword[4];
};

// Rows past `count` repeat the last one: they are computed and not stored.
struct StoredPanel {
  const char* first;
  int64_t stride;
  int count;
  const char* row(int r) const { return first + (r < count ? r : count - 1) * stride; }
};

// Of each row the bytes from `offset` on, of which only `bytes` exist; the others count as zero.
inline Dwords gather_dwords(const StoredPanel& panel, int64_t offset, int64_t bytes = 16) {
  const auto mask = static_cast<__mmask16>(bytes >= 16 ? 0xffffu : bytes <= 0 ? 0u : (1u << bytes) - 1u);
  const auto load = [&](int r) { return _mm_maskz_loadu_epi8(mask, panel.row(r) + offset); };
  __m512i z[4];
  for (int i = 0; i < 4; ++i) {  // rows i, i + 4, i + 8, i + 12
    z[i] = _mm512_castsi128_si512(load(i));
    z[i] = _mm512_inserti32x4(z[i], load(i + 4), 1);
    z[i] = _mm512_inserti32x4(z[i], load(i + 8), 2);
    z[i] = _mm512_inserti32x4(z[i], load(i + 12), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(z[0], z[1]), high01 = _mm512_unpackhi_epi32(z[0], z[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(z[2], z[3]), high23 = _mm512_unpackhi_epi32(z[2], z[3]);
  return {{_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
           _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)}};
}

inline void put(uint8_t* out, __m512i x) { _mm512_store_si512(out, x); }

// The vectors of a block of MXFP4 with two values of K a lane: from packed dwords, whose v-th word has its code in
// the low four bits; and all of a stored block, each decoded as F has it.
template <int v, class Load>
MXMOE_INLINE __m512i mxfp4_words(const Load& dword) {
  return v % 4 == 0 ? dword(v / 4) : _mm512_srli_epi16(dword(v / 4), 4 * (v % 4));
}
template <class F>
inline void unpack_mxfp4_words(const StoredPanel& panel, int64_t block, uint8_t* out, int stride) {
  const __m512i high_nibble = _mm512_set1_epi32(0x00040000);  // shift counts of a lane's two words
  const __m512i spread = _mm512_broadcast_i32x4(              // the lowest byte of a lane into both its words
      _mm_setr_epi8(0, -128, 0, -128, 4, -128, 4, -128, 8, -128, 8, -128, 12, -128, 12, -128));
  const Dwords codes = gather_dwords(panel, block * kMxBlockBytes);
  for (int i = 0; i < 4; ++i) {
    for (int byte = 0; byte < 4; ++byte) {
      const __m512i from = _mm512_add_epi32(spread, _mm512_set1_epi32(byte * 0x00010001));
      put(out + (4 * i + byte) * stride,
          F::decode(_mm512_srlv_epi16(_mm512_shuffle_epi8(codes.dword[i], from), high_nibble)));
    }
  }
}

// --- scales: sixteen float32, one a row ---

// 2^(byte - 127). 2^-127 is subnormal in float32.
inline __m512 e8m0_scale(__m512i bytes_in_dwords) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(bytes_in_dwords, 23), _mm512_set1_epi32(0x00400000)));
}
inline __m512 packed_e8m0_scale(const char* p) {
  return e8m0_scale(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline __m512 packed_bf16_scale(const char* p) {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))).v;
}

// Of a power of two that is neither subnormal nor 2^127.
inline __m512 inverse_power(__m512 power) {
  return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(0x7f000000), _mm512_castps_si512(power)));
}

// Blocks [first, first + count) of scales as stored, into [block][row] with `stride` floats from block to block.
inline void stored_e8m0_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
  Dwords bytes{};
  for (int i = 0; i < count; ++i) {
    if (i % 16 == 0) bytes = gather_dwords(panel, first + i, count - i);
    const __m512i shifted = _mm512_srl_epi32(bytes.dword[i % 16 / 4], _mm_cvtsi32_si128(8 * (i % 4)));
    _mm512_store_ps(out + i * stride, e8m0_scale(_mm512_and_si512(shifted, _mm512_set1_epi32(255))));
  }
}
inline void stored_bf16_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
  Dwords pairs{};
  for (int i = 0; i < count; ++i) {
    if (i % 8 == 0) pairs = gather_dwords(panel, 2 * (first + i), 2 * (count - i));
    const __m512i pair = pairs.dword[i % 8 / 2];
    const __m512i bits = i % 2 == 0 ? _mm512_slli_epi32(pair, 16) : _mm512_and_si512(pair, _mm512_set1_epi32(-65536));
    _mm512_store_si512(out + i * stride, bits);
  }
}

// --- ranges ---

// The bits of the lowest and highest of some positive float32, which are ordered as the numbers are.
struct ScaleRange {
  int32_t lowest, highest;
};
constexpr ScaleRange kNoScales = {0x7fffffff, 0};

constexpr int32_t exponent_of(int32_t bits) { return bits >> 23; }

inline ScaleRange join(const ScaleRange& a, const ScaleRange& b) {
  return {a.lowest < b.lowest ? a.lowest : b.lowest, a.highest > b.highest ? a.highest : b.highest};
}

// The lowest and highest of each of sixteen rows' e8m0 scales.
struct E8m0Ranges {
  __m128i lowest, highest;
  bool within(int binades) const {
    const __m128i wider = _mm_subs_epu8(_mm_sub_epi8(highest, lowest), _mm_set1_epi8(static_cast<char>(binades)));
    return _mm_testz_si128(wider, wider) != 0;
  }
};

// Of some blocks, `stride` bytes apart.
inline E8m0Ranges e8m0_ranges(const char* scales, int64_t stride, int blocks) {
  E8m0Ranges all = {_mm_set1_epi8(-1), _mm_setzero_si128()};
  for (int b = 0; b < blocks; ++b) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + b * stride));
    all.lowest = _mm_min_epu8(all.lowest, x), all.highest = _mm_max_epu8(all.highest, x);
  }
  return all;
}

// Of all rows.
inline ScaleRange e8m0_range(const E8m0Ranges& rows) {
  // The largest are the smallest of what is left to 255.
  const auto smallest = [](__m128i bytes16) {
    const __m128i words = _mm_min_epu8(bytes16, _mm_srli_epi16(bytes16, 8));
    return _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_and_si128(words, _mm_set1_epi16(255)))) & 255;
  };
  const auto bits = [](int byte) { return byte == 0 ? 0x00400000 : byte << 23; };
  return {bits(smallest(rows.lowest)), bits(255 - smallest(_mm_xor_si128(rows.highest, _mm_set1_epi8(-1))))};
}

// Prepared rows end with the range of what a product's scales meet there: the scales of an int8 row's blocks, the
// magnitudes of a bfloat16 row without its zeros.
inline ScaleRange* row_range(const PreparedRows& a, int64_t row) {
  return reinterpret_cast<ScaleRange*>(a.scales + (row + 1) * a.block_stride) - 1;
}

// --- formats ---

inline __m512i broadcast_dword(const void* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return _mm512_set1_epi32(x);
}

// Activations of which each vector of weights meets one dword.
struct DwordTokens {
  using Dot = __m512i;
  using Lift = __m512i;
  static constexpr int kTokenBytes = 4;
  static const char* row(const PreparedRows& a, int64_t row) {
    return static_cast<const char*>(a.values) + row * a.value_stride;
  }
  static MXMOE_INLINE __m512i token(const char* p) { return broadcast_dword(p); }
};

// A format is a class of static members:
// kInteger: sums are integers, and activations have a scale a block (BlockMeta). kScaled: weights have one.
// kPowers: the scales of the weights are powers of two. Where folds() says that nothing can overflow or vanish,
// weights are scaled as they are decoded for many tokens, instead of their products. The bits are the same. Weights
// that stay integers are scaled up from a unit of their row, the smallest of a chunk's scales, by kFoldedBinades at
// most, and sums kept in that unit meanwhile. kGroup: how many tokens are worked on at a time, with two panels.
// kDecoded: for many, vectors are kept in a chunk. kVectors vectors make a block of a panel; a lane has some values
// of K, of which product() adds up the products with what token() has of the activations, in a Dot that begins as
// start() has it. Few: the format that a few tokens take, of the same bits, from the same prepared rows.
// vector<v>(dwords) makes the v-th from the packed dwords of the block; unpack() writes all of a stored block.
// add_scaled() adds a block's products to a sum, both scaled.

// --- where a product finds the blocks of one or two panels ---

// Decoded, in the first-level cache.
template <class F>
struct alignas(64) Chunk {
  uint8_t weights[F::kChunk * F::kVectors * kTileRows * 4];  // [block][vector][panel][row] dwords
  float scales[F::kScaled ? F::kChunk * kTileRows : 16];     // [block][panel][row]
};

template <class F, int P>
struct ChunkSource {
  const Chunk<F>& chunk;
  template <int v>
  MXMOE_INLINE __m512i vector(int block, int panel) const {
    return _mm512_load_si512(chunk.weights + ((block * F::kVectors + v) * P + panel) * 64);
  }
  MXMOE_INLINE __m512 scale(int block, int panel) const {
    return _mm512_load_ps(chunk.scales + (block * P + panel) * kPanelRows);
  }
  MXMOE_INLINE __m512 unit(int panel) const { return _mm512_load_ps(chunk.scales + panel * kPanelRows); }
  void begin(int) const {}
  template <int v>
  void fetch(int) const {}
};

// As packed in memory, decoded in registers; with kFetch not yet in a cache.
template <class F, int P, bool kFetch = true>
struct PackedSource {
  const char* values;  // of the first panel, at the first block
  const char* scales;
  int64_t value_stride, scale_stride;  // from panel to panel
  int64_t value_block, scale_block;    // from block to block
  int64_t offset;                      // of the first block in its panel
  FetchDistance distance;
  MXMOE_INLINE const char* block_at(int block, int panel) const {
    return values + panel * value_stride + block * value_block;
  }
  template <int v>
  MXMOE_INLINE __m512i vector(int block, int panel) const {
    const char* p = block_at(block, panel);
    return F::template vector<v>([&](int i) { return _mm512_loadu_si512(p + 64 * i); });
  }
  MXMOE_INLINE __m512 scale(int block, int panel) const {
    return F::scale(scales + panel * scale_stride + block * scale_block);
  }
  // What lies some way ahead: the hardware follows a panel, but starts anew at each page and each tile. Past the end
  // of a panel comes the one that will take its place in the next tile. (Inlined by force: a function that does
  // nothing but fetch counts as one without effect, and GCC drops its call.)
  MXMOE_INLINE const char* ahead(int block) const {
    constexpr int kAhead = 8192;
    const bool past = offset + block * value_block + kAhead >= value_stride;
    return block_at(block, 0) + kAhead + (past ? (P - 1) * value_stride : 0);
  }
  // Two panels' products take longer than their lines, which may come in bursts.
  MXMOE_INLINE void begin(int block) const {
    if (!kFetch || P == 1) return;
    const char* p = ahead(block);
    for (int panel = 0; panel < P; ++panel, p += value_stride) {
      for (int i = 0; i < F::kPackedBytes + (F::kScaled ? 64 : 0); i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
    }
  }
  // One panel is read as fast as memory goes: each load has a line to fetch beside it, and stays there, as bursts,
  // which compilers make of what they may move, keep loads waiting. The last is for the scales, most likely.
  template <int v>
  MXMOE_INLINE void fetch(int block) const {
    constexpr int kVectorsPerLine = F::kVectors * 64 / F::kPackedBytes;
    if (!kFetch || P > 1 || v % kVectorsPerLine != 0) return;
    const char* p = block_at(block, 0);
    fetch_ahead(p + v / kVectorsPerLine * 64, distance);
    if (F::kScaled && v + kVectorsPerLine == F::kVectors) fetch_ahead(p + F::kPackedBytes, distance);
    __asm__ volatile("" ::: "memory");
  }
};

// As packed, and leaves what it decodes in a chunk; with kFold the scales are part of it, and those of the chunk are
// the rows' units.
template <class F, int P, bool kFold>
struct DecodingSource {
  PackedSource<F, P, false> from;
  Chunk<F>& chunk;
  typename F::Lift lift[P] = {};
  template <int v>
  MXMOE_INLINE __m512i vector(int block, int panel) const {
    __m512i decoded;
    if constexpr (kFold) {
      const char* p = from.block_at(block, panel);
      decoded = F::template vector<v>([&](int i) { return _mm512_loadu_si512(p + 64 * i); }, lift[panel]);
    } else {
      decoded = from.template vector<v>(block, panel);
    }
    put(chunk.weights + ((block * F::kVectors + v) * P + panel) * 64, decoded);
    return decoded;
  }
  MXMOE_INLINE __m512 scale(int block, int panel) const {
    const __m512 decoded = from.scale(block, panel);
    _mm512_store_ps(chunk.scales + (block * P + panel) * kPanelRows, decoded);
    return decoded;
  }
  MXMOE_INLINE __m512 unit(int panel) const { return ChunkSource<F, P>{chunk}.unit(panel); }
  MXMOE_INLINE void begin(int block) {
    if constexpr (kFold) {
      for (int p = 0; p < P; ++p) {
        const __m512i above =
            _mm512_sub_epi32(_mm512_castps_si512(from.scale(block, p)), _mm512_castps_si512(unit(p)));
        lift[p] = F::lift(_mm512_srai_epi32(above, 23));
      }
    }
  }
  template <int v>
  void fetch(int) const {}
};

// --- blocks times a few tokens ---

template <class F, int P, int M, int v, class Source>
MXMOE_INLINE void multiply_vector(Source& source, int block, const char* const (&x)[M],
                                  typename F::Dot (&dot)[M][P]) {
  __m512i y[P];
  source.template fetch<v>(block);
  for (int p = 0; p < P; ++p) y[p] = source.template vector<v>(block, p);
  for (int m = 0; m < M; ++m) {
    const typename F::Dot token = F::token(x[m] + (block * F::kVectors + v) * F::kTokenBytes);
    for (int p = 0; p < P; ++p) dot[m][p] = F::product(dot[m][p], y[p], token);
  }
}

template <class F, int P, int M, class Source, int... v>
MXMOE_INLINE void multiply_block(Source& source, int block, const char* const (&x)[M], typename F::Dot (&dot)[M][P],
                                 std::integer_sequence<int, v...>) {
  (multiply_vector<F, P, M, v>(source, block, x, dot), ...);
}

// With more tokens than this the sums find no room in registers beside a block's products.
template <int M>
constexpr bool kHeld = M <= 6;

template <class F, int P, int M, bool kFold, class Source>
inline void multiply(const Source& from, const PreparedRows& a, const int64_t* rows, int64_t first, int blocks,
                     float* acc) {
  Source source = from;  // whose members can be in registers: nobody else sees them
  const char* x[M];
  const BlockMeta* meta[M];
  __m512 sum[M][P];
  constexpr bool kScale = F::kScaled && !kFold;
  constexpr bool kUnits = kFold && F::kInteger;
  static_assert(!kUnits || kHeld<M>);
  for (int m = 0; m < M; ++m) {
    x[m] = F::row(a, rows[m]) + first * F::kVectors * F::kTokenBytes;
    meta[m] = reinterpret_cast<const BlockMeta*>(a.scales + rows[m] * a.block_stride) + first;
    for (int p = 0; p < P && kHeld<M>; ++p) {
      sum[m][p] = _mm512_load_ps(acc + m * kTileRows + p * kPanelRows);
      if constexpr (kUnits) sum[m][p] = _mm512_mul_ps(sum[m][p], inverse_power(source.unit(p)));
    }
  }
  for (int b = 0; b < blocks; ++b) {
    source.begin(b);
    typename F::Dot dot[M][P];
    for (int m = 0; m < M; ++m) {
      for (int p = 0; p < P; ++p) dot[m][p] = F::start(meta[m] + b);
    }
    multiply_block<F, P, M>(source, b, x, dot, std::make_integer_sequence<int, F::kVectors>());
    for (int p = 0; p < P; ++p) {
      const __m512 scale = kScale ? source.scale(b, p) : _mm512_setzero_ps();
      for (int m = 0; m < M; ++m) {
        float* at = acc + m * kTileRows + p * kPanelRows;
        if (!kHeld<M>) sum[m][p] = _mm512_load_ps(at);
        if constexpr (F::kInteger) {
          sum[m][p] = F::template add_scaled<kFold>(sum[m][p], dot[m][p], scale, meta[m][b].scale);
        } else if constexpr (kScale) {
          sum[m][p] = _mm512_fmadd_ps(_mm512_castsi512_ps(dot[m][p]), scale, sum[m][p]);
        } else {
          sum[m][p] = _mm512_add_ps(sum[m][p], _mm512_castsi512_ps(dot[m][p]));
        }
        if (!kHeld<M>) _mm512_store_ps(at, sum[m][p]);
      }
    }
  }
  for (int m = 0; m < M && kHeld<M>; ++m) {
    for (int p = 0; p < P; ++p) {
      if constexpr (kUnits) sum[m][p] = _mm512_mul_ps(sum[m][p], source.unit(p));
      _mm512_store_ps(acc + m * kTileRows + p * kPanelRows, sum[m][p]);
    }
  }
}

// What comes next in memory, fetched bit by bit while the tokens of a chunk are worked on.
struct Ahead {
  const char* begin[2];
  int64_t bytes, done, step;
  MXMOE_INLINE void some() {
    const int64_t end = done + step < bytes ? done + step : bytes;
    for (; done < end; done += 64) {
      _mm_prefetch(begin[0] + done, _MM_HINT_T0);
      _mm_prefetch(begin[1] + done, _MM_HINT_T0);
    }
  }
};

constexpr int kFew = 6;  // tokens that are multiplied with one panel at a time

// The next `count` tokens, at most M.
template <class F, int P, int M, bool kFold, class Source>
inline void multiply_next(Source& source, const PreparedRows& a, const int64_t* rows, int64_t count, int64_t first,
                          int blocks, float* acc) {
  if (count == M) return multiply<F, P, M, kFold>(source, a, rows, first, blocks, acc);
  if constexpr (M > 1) multiply_next<F, P, M - 1, kFold>(source, a, rows, count, first, blocks, acc);
}

template <class F, int P, bool kFold = false, class Source>
inline void multiply_rows(Source&& source, const PreparedRows& a, const int64_t* rows, int64_t count, int64_t first,
                          int blocks, Ahead& ahead, float* acc) {
  while (count > 0) {
    // Few products at a time wait for each other: what would be left with few is halved before.
    const bool halves = count > F::kGroup && count < F::kGroup + 5;
    const int64_t taken = halves ? (count + 1) / 2 : count < F::kGroup ? count : F::kGroup;
    ahead.some();
    multiply_next<F, P, F::kGroup, kFold>(source, a, rows, taken, first, blocks, acc);
    count -= taken, rows += taken, acc += taken * kTileRows;
  }
}

// --- tiles ---

template <class F>
struct PanelProduct {
  const PreparedRows& a;
  const WeightRows& w;
  int64_t n_end, k;

  const char* values(int64_t n) const {
    const char* base = static_cast<const char*>(w.values);
    return base + (w.packed ? n / kPanelRows : n) * w.value_stride;
  }
  const char* scales(int64_t n) const {
    const char* base = static_cast<const char*>(w.scales);
    return base + (w.packed ? n / kPanelRows : n) * w.scale_stride;
  }
  template <int P, bool kFetch = true>
  PackedSource<F, P, kFetch> source(int64_t n, int64_t block) const {
    const int64_t value = block * w.value_block, scale = block * w.scale_block;
    return {values(n) + value, scales(n) + scale, w.value_stride, w.scale_stride,
            w.value_block,     w.scale_block,     value,          fetch_distance(8192)};
  }

  ScaleRange range_of(const int64_t* rows, int64_t count) const {
    ScaleRange all = kNoScales;
    if (!F::kPowers) return all;
    for (int64_t i = 0; i < count; ++i) all = join(all, *row_range(a, rows[i]));
    return all;
  }

  // Whether the scales of some blocks as packed can be folded into the weights; if so, the chunk's become the rows'
  // units. `so_far` is whether the sums until now can be in units.
  template <int P>
  bool folds(int64_t n, int64_t first, int blocks, const ScaleRange& range, bool& so_far, Chunk<F>& chunk) const {
    const char* bytes = scales(n) + first * w.scale_block;
    E8m0Ranges rows[P];
    ScaleRange all = kNoScales;
    bool close = true;
    for (int p = 0; p < P; ++p) {
      rows[p] = e8m0_ranges(bytes + p * w.scale_stride, w.scale_block, blocks);
      all = join(all, e8m0_range(rows[p]));
      close &= rows[p].within(F::kFoldedBinades);
    }
    const bool in_range = F::folds(all, range);
    if (F::kInteger) so_far &= in_range;
    if (!in_range || !so_far || !close) return false;
    for (int p = 0; p < P; ++p) {
      const __m512 unit = F::kInteger ? e8m0_scale(_mm512_cvtepu8_epi32(rows[p].lowest)) : _mm512_set1_ps(1.0f);
      _mm512_store_ps(chunk.scales + p * kPanelRows, unit);
    }
    return true;
  }

  // Some blocks of weights as stored.
  template <int P>
  void unpack(int64_t n, int64_t first, int blocks, Chunk<F>& to) const {
    for (int p = 0; p < P; ++p) {
      const int64_t row = n + p * kPanelRows;
      const int count = static_cast<int>(n_end - row < kPanelRows ? n_end - row : kPanelRows);
      const StoredPanel panel{values(row), w.value_stride, count};
      for (int b = 0; b < blocks; ++b) {
        F::unpack(panel, first + b, k, to.weights + (b * F::kVectors * P + p) * 64, 64 * P);
      }
      F::unpack_scales({scales(row), w.scale_stride, count}, first, blocks, to.scales + p * kPanelRows,
                       kPanelRows * P);
    }
  }

  // Two panels' chunk from a block on, to be fetched while `count` rows are worked on; scales of their own at once.
  template <int P>
  Ahead fetch(int64_t n, int64_t block, int64_t count) const {
    if (n + P * kPanelRows > n_end) return {{nullptr, nullptr}, 0, 0, 0};
    if (F::kScaled && w.scale_block < w.value_block) {
      const char* scale = scales(n) + block * w.scale_block;
      for (int64_t at = 0; at < F::kChunk * w.scale_block; at += 64) {
        _mm_prefetch(scale + at, _MM_HINT_T0);
        _mm_prefetch(scale + (P - 1) * w.scale_stride + at, _MM_HINT_T0);
      }
    }
    const char* begin = values(n) + block * w.value_block;
    const int64_t bytes = F::kChunk * w.value_block;
    return {{begin, begin + (P - 1) * w.value_stride}, bytes, 0, (bytes / (count / F::kGroup) + 63) / 64 * 64};
  }

  // Blocks of two panels as packed times more rows than a group: decoded for the first, used again for the others.
  template <int P, bool kFold>
  void decode_and_multiply(const int64_t* rows, int64_t count, int64_t n, int64_t first, int blocks, Ahead& ahead,
                           Chunk<F>& chunk, float* acc) const {
    DecodingSource<F, P, kFold> decoding{source<P, false>(n, first), chunk};
    multiply<F, P, F::kGroup, kFold>(decoding, a, rows, first, blocks, acc);
    multiply_rows<F, P, kFold>(ChunkSource<F, P>{chunk}, a, rows + F::kGroup, count - F::kGroup, first, blocks, ahead,
                               acc + F::kGroup * kTileRows);
  }

  // One or two panels from row n on times a few rows: one panel after the other, so that memory is read in order.
  template <int P>
  void few(const int64_t* rows, int64_t count, int64_t n, float* acc) const {
    const int blocks = static_cast<int>((k + kMxBlock - 1) / kMxBlock);
    using Few = typename F::Few;
    const PanelProduct<Few> product{a, w, n_end, k};
    Ahead nothing{{nullptr, nullptr}, 0, 0, 0};
    for (int p = 0; p < P; ++p) {
      multiply_rows<Few, 1>(product.template source<1>(n + p * kPanelRows, 0), a, rows, count, 0, blocks, nothing,
                            acc + p * kPanelRows);
    }
  }

  // One or two panels from row n on times up to kTileTokens rows, whose range is `range`.
  template <int P>
  void tile(const int64_t* rows, int64_t count, const ScaleRange& range, int64_t n, Chunk<F>& chunk,
            float* acc) const {
    if (w.packed && count <= kFew) return few<P>(rows, count, n, acc);
    const int64_t blocks = (k + kMxBlock - 1) / kMxBlock;
    // Enough work to fetch the next chunk behind it, and to decode this one for.
    const bool many = count > (F::kDecoded ? 2 * kFew : 4 * kFew);
    bool so_far = true;
    for (int64_t b = 0; b < blocks; b += F::kChunk) {
      const int some = static_cast<int>(blocks - b < F::kChunk ? blocks - b : F::kChunk);
      Ahead ahead{{nullptr, nullptr}, 0, 0, 0};
      if (w.packed && many)
        ahead = b + some < blocks ? fetch<P>(n, b + some, count) : fetch<P>(n + P * kPanelRows, 0, count);
      if (!w.packed) {
        unpack<P>(n, b, some, chunk);
        multiply_rows<F, P>(ChunkSource<F, P>{chunk}, a, rows, count, b, some, ahead, acc);
      } else if (!many) {
        multiply_rows<F, P>(source<P>(n, b), a, rows, count, b, some, ahead, acc);
      } else if constexpr (!F::kDecoded) {
        multiply_rows<F, P>(source<P, false>(n, b), a, rows, count, b, some, ahead, acc);
      } else {
        bool fold = false;
        if constexpr (F::kPowers) fold = folds<P>(n, b, some, range, so_far, chunk);
        const auto run =
            fold ? &PanelProduct::decode_and_multiply<P, F::kPowers> : &PanelProduct::decode_and_multiply<P, false>;
        (this->*run)(rows, count, n, b, some, ahead, chunk, acc);
      }
    }
  }
};

// The products of the prepared rows listed in `rows` (of all, if that is null) with weight rows [n_begin, n_end), 32
// weight rows and up to kTileTokens tokens at a time, handed to emit(first token, tokens, first weight row, weight
// rows, results), with kTileRows results a token. n_begin is a multiple of 16.
template <class F, class Emit>
inline void for_each_tile(const PreparedRows& a, const int64_t* rows, int64_t num_rows, const WeightRows& w,
                          int64_t n_begin, int64_t n_end, int64_t k, const Emit& emit) {
  Chunk<F> chunk;
  alignas(64) float acc[kTileTokens * kTileRows];
  int64_t order[kTileTokens];
  const PanelProduct<F> product{a, w, n_end, k};
  // The activations are more bytes than the weights that go with them: a tile's tokens stay in the second-level
  // cache.
  for (int64_t m = 0; m < num_rows; m += kTileTokens) {
    const int64_t count = num_rows - m < kTileTokens ? num_rows - m : kTileTokens;
    for (int64_t i = 0; i < count; ++i) order[i] = rows == nullptr ? m + i : rows[m + i];
    const ScaleRange range = product.range_of(order, count);
    for (int64_t n = n_begin; n < n_end; n += kTileRows) {
      const int64_t width = n_end - n < kTileRows ? n_end - n : kTileRows;
      std::memset(acc, 0, static_cast<size_t>(count) * kTileRows * sizeof(float));
      if (width > kPanelRows) {
        product.template tile<2>(order, count, range, n, chunk, acc);
      } else {
        product.template tile<1>(order, count, range, n, chunk, acc);
      }
      emit(m, count, n, width, acc);
    }
  }
}

// A tile's bias is needed when its sums are done; then it should not be waited for.
inline void fetch_bias(const float* bias_f32, const bf16* bias_bf16, int64_t begin, int64_t end) {
  const auto fetch = [](const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) prefetch(static_cast<const char*>(from) + at);
  };
  if (bias_f32 != nullptr) fetch(bias_f32 + begin, (end - begin) * 4);
  if (bias_bf16 != nullptr) fetch(bias_bf16 + begin, (end - begin) * 2);
}
