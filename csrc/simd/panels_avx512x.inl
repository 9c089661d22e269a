// Matrix products by panels: sixteen weight rows in the lanes of a vector, so that nothing is summed across lanes.
// Every output has one accumulator that sees the blocks of K in order, whatever the number of tokens and the layout
// of the weights, so its bits depend on its own row alone. Few tokens read the weights once, straight from memory;
// for many, a chunk of two panels is decoded into the first-level cache and used for all of them. Included inside the
// namespace and target region of avx512x.

constexpr int kTileRows = 2 * kPanelRows;  // weight rows of one pass, and the row stride of its results
constexpr int kTileTokens = 96;            // tokens of one pass: what they sum up stays in the second-level cache

// The formats, their sources and the loops are read together, so the file is longer than most.

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

// --- formats ---
// kPowers: an int8 product's scales of the weights are powers of two.
// kVectors vectors make a block of a panel: bytes for vpdpbusd, four of K a lane, or pairs of bfloat16 for vdpbf16ps.
// vector<v>(dwords) makes the v-th from the packed dwords of the block; unpack() writes all of a stored block.

inline void put(uint8_t* out, __m512i x) { _mm512_store_si512(out, x); }

// Codes raised by 12 to be unsigned, and doubled to be integers: the activations' scales are halved for it.
struct PanelI8Mxfp4 {
  static constexpr bool kInteger = true, kScaled = true, kDecoded = true, kPowers = true;
  static constexpr int kVectors = 8, kChunk = 16, kPackedBytes = kPackedMxfp4Bytes, kPackedScaleBytes = kPanelRows;
  static MXMOE_INLINE __m512i decode(__m512i codes) {
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return decode(v % 2 == 0 ? dword(v / 2) : _mm512_srli_epi16(dword(v / 2), 4));
  }
  static __m512 scale(const char* p) { return packed_e8m0_scale(p); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    const Dwords codes = gather_dwords(panel, block * kMxBlockBytes);
    for (int i = 0; i < 4; ++i) {
      put(out + 2 * i * stride, decode(codes.dword[i]));
      put(out + (2 * i + 1) * stride, decode(_mm512_srli_epi16(codes.dword[i], 4)));
    }
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_e8m0_scales(panel, first, count, out, stride);
  }
};

// Codes raised by 128.
struct PanelI8I8 {
  static constexpr bool kInteger = true, kScaled = true, kDecoded = false, kPowers = false;
  static constexpr int kVectors = 8, kChunk = 16, kPackedBytes = kPackedInt8Bytes, kPackedScaleBytes = 2 * kPanelRows;
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return dword(v);
  }
  static __m512 scale(const char* p) { return packed_bf16_scale(p); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    for (int half = 0; half < 2; ++half) {
      const Dwords codes = gather_dwords(panel, block * kMxBlock + 16 * half);
      for (int i = 0; i < 4; ++i) {
        put(out + (4 * half + i) * stride, _mm512_xor_si512(codes.dword[i], _mm512_set1_epi8(-128)));
      }
    }
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_bf16_scales(panel, first, count, out, stride);
  }
};

struct PanelBf16Mxfp4 {
  static constexpr bool kInteger = false, kScaled = true, kDecoded = true, kPowers = false;
  static constexpr int kVectors = 16, kChunk = 8, kPackedBytes = kPackedMxfp4Bytes, kPackedScaleBytes = kPanelRows;
  // The permute looks at the low five bits of a word, the fifth of which is part of another code: the table of the
  // sixteen values as bfloat16 stands twice.
  static MXMOE_INLINE __m512i decode(__m512i words) {
    const __m512i table = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, static_cast<short>(0x8000),
                          static_cast<short>(0xbf00), static_cast<short>(0xbf80), static_cast<short>(0xbfc0),
                          static_cast<short>(0xc000), static_cast<short>(0xc040), static_cast<short>(0xc080),
                          static_cast<short>(0xc0c0)));
    return _mm512_permutexvar_epi16(words, table);
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return decode(v % 4 == 0 ? dword(v / 4) : _mm512_srli_epi16(dword(v / 4), 4 * (v % 4)));
  }
  static __m512 scale(const char* p) { return packed_e8m0_scale(p); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    const __m512i high_nibble = _mm512_set1_epi32(0x00040000);  // shift counts of a lane's two words
    const __m512i spread = _mm512_broadcast_i32x4(              // the lowest byte of a lane into both its words
        _mm_setr_epi8(0, -128, 0, -128, 4, -128, 4, -128, 8, -128, 8, -128, 12, -128, 12, -128));
    const Dwords codes = gather_dwords(panel, block * kMxBlockBytes);
    for (int i = 0; i < 4; ++i) {
      for (int byte = 0; byte < 4; ++byte) {
        const __m512i from = _mm512_add_epi32(spread, _mm512_set1_epi32(byte * 0x00010001));
        const __m512i words = _mm512_srlv_epi16(_mm512_shuffle_epi8(codes.dword[i], from), high_nibble);
        put(out + (4 * i + byte) * stride, decode(words));
      }
    }
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_e8m0_scales(panel, first, count, out, stride);
  }
};

struct PanelBf16I8 {
  static constexpr bool kInteger = false, kScaled = true, kDecoded = true, kPowers = false;
  static constexpr int kVectors = 16, kChunk = 8, kPackedBytes = kPackedInt8Bytes, kPackedScaleBytes = 2 * kPanelRows;
  // Byte `kByte` of every lane as float32: exact in its upper half, which is the bfloat16.
  template <int kByte>
  static MXMOE_INLINE __m512i as_float(__m512i codes) {
    const __m512i value = _mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * kByte), 24);
    return _mm512_castps_si512(_mm512_cvtepi32_ps(value));
  }
  template <int kPair>
  static MXMOE_INLINE __m512i decode(__m512i codes) {
    return _mm512_or_si512(_mm512_srli_epi32(as_float<2 * kPair>(codes), 16), as_float<2 * kPair + 1>(codes));
  }
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return decode<v % 2>(_mm512_xor_si512(dword(v / 2), _mm512_set1_epi8(-128)));
  }
  static __m512 scale(const char* p) { return packed_bf16_scale(p); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t, uint8_t* out, int stride) {
    for (int half = 0; half < 2; ++half) {
      const Dwords codes = gather_dwords(panel, block * kMxBlock + 16 * half);
      for (int i = 0; i < 4; ++i) {
        put(out + (8 * half + 2 * i) * stride, decode<0>(codes.dword[i]));
        put(out + (8 * half + 2 * i + 1) * stride, decode<1>(codes.dword[i]));
      }
    }
  }
  static void unpack_scales(const StoredPanel& panel, int64_t first, int count, float* out, int stride) {
    stored_bf16_scales(panel, first, count, out, stride);
  }
};

struct PanelBf16Bf16 {
  static constexpr bool kInteger = false, kScaled = false, kDecoded = false, kPowers = false;
  static constexpr int kVectors = 16, kChunk = 8, kPackedBytes = kPackedBf16Bytes, kPackedScaleBytes = 0;
  template <int v, class Load>
  static MXMOE_INLINE __m512i vector(const Load& dword) {
    return dword(v);
  }
  static __m512 scale(const char*) { return _mm512_setzero_ps(); }
  static void unpack(const StoredPanel& panel, int64_t block, int64_t k, uint8_t* out, int stride) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t at = block * kMxBlock + 8 * quarter;
      // The activations are padded with zeros, the weights are not.
      const Dwords pairs = gather_dwords(panel, 2 * (at < k ? at : 0), 2 * (k - at));
      for (int i = 0; i < 4; ++i) put(out + (4 * quarter + i) * stride, pairs.dword[i]);
    }
  }
  static void unpack_scales(const StoredPanel&, int64_t, int, float*, int) {}
};

// The bits of the lowest and highest of some positive float32, which are ordered as the numbers are.
struct ScaleRange {
  int32_t lowest, highest;
};
constexpr ScaleRange kNoScales = {0x7fffffff, 0};

// Whether every product of two such scales, the one a power of two, is a normal number. Then it can be had by adding
// exponents, on units that have time for it, where a multiplication would wait for those that do the dot products.
inline bool exponents_add(const ScaleRange& powers, const ScaleRange& others) {
  constexpr int kBits = 23, kBias = 127, kTop = 254;
  const auto normal = [](int32_t exponent) { return exponent > 0 && exponent <= kTop; };
  for (const int32_t power : {powers.lowest >> kBits, powers.highest >> kBits}) {
    for (const int32_t other : {others.lowest >> kBits, others.highest >> kBits}) {
      if (!normal(power) || !normal(other) || !normal(power + other - kBias)) return false;
    }
  }
  return true;
}

// --- where a product finds the blocks of one or two panels ---

// Decoded, in the first-level cache.
template <class F>
struct alignas(64) Chunk {
  uint8_t weights[F::kChunk * F::kVectors * kTileRows * 4];  // [block][vector][panel][row] dwords
  float scales[F::kScaled ? F::kChunk * kTileRows : 16];     // [block][panel][row]
  ScaleRange range;                                          // of the scales, with kPowers
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
  void fetch(int) const {}
};

// As packed in memory, decoded in registers; with kFetch not yet in a cache.
template <class F, int P, bool kFetch = true>
struct PackedSource {
  const char* values;  // of the first panel, at the first block
  const char* scales;
  int64_t value_stride, scale_stride;  // from panel to panel
  int64_t value_offset, scale_offset;  // of the first block in its panel
  template <int v>
  MXMOE_INLINE __m512i vector(int block, int panel) const {
    const char* p = values + panel * value_stride + block * F::kPackedBytes;
    return F::template vector<v>([&](int i) { return _mm512_loadu_si512(p + 64 * i); });
  }
  MXMOE_INLINE __m512 scale(int block, int panel) const {
    return F::scale(scales + panel * scale_stride + block * F::kPackedScaleBytes);
  }
  // Fetches some way ahead: the hardware follows a panel, but starts anew at each page and each tile. Past the end of
  // a panel comes the one that will take its place in the next tile. (Inlined by force: a function that does nothing
  // but fetch counts as one without effect, and GCC drops its call.)
  MXMOE_INLINE void fetch(int block) const {
    if (!kFetch) return;
    constexpr int kAhead = 8192, kScalesAhead = 1024;
    const int64_t value = block * F::kPackedBytes + kAhead;
    const char* p = values + value + (value_offset + value >= value_stride ? (P - 1) * value_stride : 0);
    for (int panel = 0; panel < P; ++panel, p += value_stride) {
      for (int i = 0; i < F::kPackedBytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
    }
    if (F::kScaled && block * F::kPackedScaleBytes % 64 == 0) {
      const int64_t scale = block * F::kPackedScaleBytes + kScalesAhead;
      const char* q = scales + scale + (scale_offset + scale >= scale_stride ? (P - 1) * scale_stride : 0);
      for (int panel = 0; panel < P; ++panel, q += scale_stride) _mm_prefetch(q, _MM_HINT_T0);
    }
  }
};

// --- blocks times a few tokens ---

inline __m512i broadcast_dword(const void* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return _mm512_set1_epi32(x);
}

// What int8 activations of a block have beside their codes. A row's blocks are followed by the ScaleRange of them.
struct BlockMeta {
  float scale;
  int32_t start;  // -raise * sum of the codes: takes the raise of the weights off again
};
static_assert(sizeof(BlockMeta) == sizeof(ScaleRange), "stands in a block's place");

template <class F, int P, int M, int v, class Source>
MXMOE_INLINE void multiply_vector(const Source& source, int block, const char* const (&x)[M], __m512i (&dot)[M][P]) {
  __m512i y[P];
  for (int p = 0; p < P; ++p) y[p] = source.template vector<v>(block, p);
  for (int m = 0; m < M; ++m) {
    const __m512i codes = broadcast_dword(x[m] + (block * F::kVectors + v) * 4);
    for (int p = 0; p < P; ++p) {
      if constexpr (F::kInteger) {
        dot[m][p] = _mm512_dpbusd_epi32(dot[m][p], y[p], codes);
      } else {
        dot[m][p] =
            _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(dot[m][p]), (__m512bh)y[p], (__m512bh)codes));
      }
    }
  }
}

template <class F, int P, int M, class Source, int... v>
MXMOE_INLINE void multiply_block(const Source& source, int block, const char* const (&x)[M], __m512i (&dot)[M][P],
                                 std::integer_sequence<int, v...>) {
  (multiply_vector<F, P, M, v>(source, block, x, dot), ...);
}

// A block's scale of the weights times that of the activations.
template <bool kAdd>
MXMOE_INLINE __m512 both_scales(__m512 weights, const float& activations) {
  if (!kAdd) return _mm512_mul_ps(weights, _mm512_set1_ps(activations));
  const __m512i exponents = _mm512_sub_epi32(_mm512_castps_si512(weights), _mm512_set1_epi32(0x3f800000));
  return _mm512_castsi512_ps(_mm512_add_epi32(exponents, broadcast_dword(&activations)));
}

template <class F, int P, int M, bool kAdd, class Source>
inline void multiply(const Source& source, const PreparedRows& a, const int64_t* rows, int64_t first, int blocks,
                     float* acc) {
  const char* x[M];
  const BlockMeta* meta[M];
  __m512 sum[M][P];
  for (int m = 0; m < M; ++m) {
    x[m] = static_cast<const char*>(a.values) + rows[m] * a.value_stride + first * F::kVectors * 4;
    meta[m] = reinterpret_cast<const BlockMeta*>(a.scales + rows[m] * a.block_stride) + first;
    for (int p = 0; p < P; ++p) sum[m][p] = _mm512_load_ps(acc + m * kTileRows + p * kPanelRows);
  }
  for (int b = 0; b < blocks; ++b) {
    source.fetch(b);
    __m512i dot[M][P];
    for (int m = 0; m < M; ++m) {
      for (int p = 0; p < P; ++p) {
        if constexpr (F::kInteger) {
          dot[m][p] = _mm512_set1_epi32(meta[m][b].start);
        } else {
          dot[m][p] = _mm512_setzero_si512();
        }
      }
    }
    multiply_block<F, P, M>(source, b, x, dot, std::make_integer_sequence<int, F::kVectors>());
    for (int p = 0; p < P; ++p) {
      const __m512 scale = source.scale(b, p);
      for (int m = 0; m < M; ++m) {
        if constexpr (F::kInteger) {
          const __m512 both = both_scales<kAdd>(scale, meta[m][b].scale);
          sum[m][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][p]), both, sum[m][p]);
        } else if constexpr (F::kScaled) {
          sum[m][p] = _mm512_fmadd_ps(_mm512_castsi512_ps(dot[m][p]), scale, sum[m][p]);
        } else {
          sum[m][p] = _mm512_add_ps(sum[m][p], _mm512_castsi512_ps(dot[m][p]));
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int p = 0; p < P; ++p) _mm512_store_ps(acc + m * kTileRows + p * kPanelRows, sum[m][p]);
  }
}

// What comes next in memory, fetched bit by bit while the tokens of a chunk are worked on.
struct Ahead {
  const char* begin[2];
  int64_t bytes, done, step;
  MXMOE_INLINE void some() {
    const int64_t end = done + step < bytes ? done + step : bytes;
    for (; done < end; done += 64) {
      _mm_prefetch(begin[0] + done, _MM_HINT_T1);
      _mm_prefetch(begin[1] + done, _MM_HINT_T1);
    }
  }
};

constexpr int kGroup = 6;  // tokens: with two panels as many accumulators as registers allow

template <class F, int P, bool kAdd = false, class Source>
inline void multiply_rows(const Source& source, const PreparedRows& a, const int64_t* rows, int64_t count,
                          int64_t first, int blocks, Ahead& ahead, float* acc) {
  for (; count >= kGroup; count -= kGroup, rows += kGroup, acc += kGroup * kTileRows) {
    ahead.some();
    multiply<F, P, kGroup, kAdd>(source, a, rows, first, blocks, acc);
  }
  switch (count) {
    case 1:
      return multiply<F, P, 1, kAdd>(source, a, rows, first, blocks, acc);
    case 2:
      return multiply<F, P, 2, kAdd>(source, a, rows, first, blocks, acc);
    case 3:
      return multiply<F, P, 3, kAdd>(source, a, rows, first, blocks, acc);
    case 4:
      return multiply<F, P, 4, kAdd>(source, a, rows, first, blocks, acc);
    case 5:
      return multiply<F, P, 5, kAdd>(source, a, rows, first, blocks, acc);
    default:
      return;
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
    const int64_t value = block * F::kPackedBytes, scale = block * F::kPackedScaleBytes;
    return {values(n) + value, scales(n) + scale, w.value_stride, w.scale_stride, value, scale};
  }

  template <int P, int... v>
  MXMOE_INLINE void decode_block(const PackedSource<F, P>& from, int b, Chunk<F>& to,
                                 std::integer_sequence<int, v...>) const {
    for (int p = 0; p < P; ++p) {
      uint8_t* out = to.weights + (b * F::kVectors * P + p) * 64;
      (put(out + v * P * 64, from.template vector<v>(b, p)), ...);
      if (F::kScaled) _mm512_store_ps(to.scales + (b * P + p) * kPanelRows, from.scale(b, p));
    }
  }

  // The range of the rows' activation scales.
  ScaleRange activations(const int64_t* rows, int64_t count) const {
    ScaleRange all = kNoScales;
    for (int64_t i = 0; i < count; ++i) {
      const auto* meta = reinterpret_cast<const BlockMeta*>(a.scales + rows[i] * a.block_stride);
      ScaleRange row;
      std::memcpy(&row, meta + k / kMxBlock, sizeof row);
      all.lowest = row.lowest < all.lowest ? row.lowest : all.lowest;
      all.highest = row.highest > all.highest ? row.highest : all.highest;
    }
    return all;
  }

  template <int P>
  void find_range(int blocks, Chunk<F>& chunk) const {
    __m512i lowest = _mm512_set1_epi32(0x7fffffff), highest = _mm512_setzero_si512();
    for (int i = 0; i < blocks * P; ++i) {
      const __m512i scale = _mm512_load_si512(chunk.scales + i * kPanelRows);
      lowest = _mm512_min_epi32(lowest, scale), highest = _mm512_max_epi32(highest, scale);
    }
    chunk.range = {_mm512_reduce_min_epi32(lowest), _mm512_reduce_max_epi32(highest)};
  }

  template <int P>
  void decode(int64_t n, int64_t first, int blocks, bool fetch, Chunk<F>& to) const {
    if (w.packed) {
      const PackedSource<F, P> from = source<P>(n, first);
      for (int b = 0; b < blocks; ++b) {
        if (fetch) from.fetch(b);
        decode_block<P>(from, b, to, std::make_integer_sequence<int, F::kVectors>());
      }
      return;
    }
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

  // One or two panels from row n on times a few rows: one panel after the other, so that memory is read in order.
  template <int P>
  void few(const int64_t* rows, int64_t count, int64_t n, float* acc) const {
    const int blocks = static_cast<int>((k + kMxBlock - 1) / kMxBlock);
    Ahead nothing{{nullptr, nullptr}, 0, 0, 0};
    for (int p = 0; p < P; ++p) {
      multiply_rows<F, 1>(source<1>(n + p * kPanelRows, 0), a, rows, count, 0, blocks, nothing, acc + p * kPanelRows);
    }
  }

  // One or two panels from row n on times up to kTileTokens rows.
  template <int P>
  void tile(const int64_t* rows, int64_t count, int64_t n, Chunk<F>& chunk, float* acc) const {
    if (w.packed && count <= kGroup) return few<P>(rows, count, n, acc);
    const int64_t blocks = (k + kMxBlock - 1) / kMxBlock;
    const bool direct = w.packed && (!F::kDecoded || count <= 2 * kGroup);
    ScaleRange range = kNoScales;
    if constexpr (F::kPowers) range = activations(rows, count);
    for (int64_t b = 0; b < blocks; b += F::kChunk) {
      const int some = static_cast<int>(blocks - b < F::kChunk ? blocks - b : F::kChunk);
      const bool last = b + some == blocks;
      const int64_t next = last ? n + P * kPanelRows : n, at = last ? 0 : b + some;
      Ahead ahead{{nullptr, nullptr}, 0, 0, 0};
      const bool many = count >= 4 * kGroup;  // enough work to fetch the next chunk behind
      if (w.packed && many && next + P * kPanelRows <= n_end) {
        const char* begin = values(next) + at * F::kPackedBytes;
        const int64_t bytes = F::kChunk * F::kPackedBytes;
        ahead = {{begin, begin + (P - 1) * w.value_stride}, bytes, 0, (bytes / (count / kGroup) + 63) / 64 * 64};
      }
      if (direct && many) {
        multiply_rows<F, P>(source<P, false>(n, b), a, rows, count, b, some, ahead, acc);
      } else if (direct) {
        multiply_rows<F, P>(source<P>(n, b), a, rows, count, b, some, ahead, acc);
      } else {
        decode<P>(n, b, some, !many, chunk);
        const ChunkSource<F, P> from{chunk};
        if constexpr (F::kPowers) {
          find_range<P>(some, chunk);
          if (exponents_add(chunk.range, range)) {
            multiply_rows<F, P, true>(from, a, rows, count, b, some, ahead, acc);
            continue;
          }
        }
        multiply_rows<F, P>(from, a, rows, count, b, some, ahead, acc);
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
  for (int64_t n = n_begin; n < n_end; n += kTileRows) {
    const int64_t width = n_end - n < kTileRows ? n_end - n : kTileRows;
    for (int64_t m = 0; m < num_rows; m += kTileTokens) {
      const int64_t count = num_rows - m < kTileTokens ? num_rows - m : kTileTokens;
      for (int64_t i = 0; i < count; ++i) order[i] = rows == nullptr ? m + i : rows[m + i];
      std::memset(acc, 0, static_cast<size_t>(count) * kTileRows * sizeof(float));
      if (width > kPanelRows) {
        product.template tile<2>(order, count, n, chunk, acc);
      } else {
        product.template tile<1>(order, count, n, chunk, acc);
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

// --- activations ---

// The order in which an int8 product wants the activations of each eight values of K.
enum class CodeOrder { kPlain, kStored, kPacked };

inline __m256i code_order(CodeOrder order) {
  const __m128i stored = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m128i packed = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  return _mm256_broadcastsi128_si256(order == CodeOrder::kStored ? stored : packed);
}

// int8 codes per block of 32 as in prepare_i8, with their BlockMeta. Weights are raised by kRaise; kUnit is what
// an integer of theirs is worth.
template <int kRaise, CodeOrder kOrder, typename X>
inline void prepare_panel_i8(const X* x, int64_t k, const PreparedRows& to, int64_t row) {
  constexpr float kUnit = kOrder == CodeOrder::kPlain ? 1.0f : 0.5f;
  int8_t* codes = static_cast<int8_t*>(to.values) + row * to.value_stride;
  BlockMeta* meta = reinterpret_cast<BlockMeta*>(to.scales + row * to.block_stride);
  ScaleRange range = kNoScales;
  for (int64_t b = 0; b < k / kMxBlock; ++b) {
    __m256i* at = reinterpret_cast<__m256i*>(codes + b * kMxBlock);
    const float scale = kUnit * quantize_block_i8(x + b * kMxBlock, codes + b * kMxBlock);
    meta[b].scale = scale == 0.0f ? 1.0f : scale;  // nothing but zeros: any scale will do, a normal one does best
    int32_t bits;
    std::memcpy(&bits, &meta[b].scale, sizeof bits);
    range.lowest = bits < range.lowest ? bits : range.lowest;
    range.highest = bits > range.highest ? bits : range.highest;
    const __m256i block = _mm256_loadu_si256(at);
    const __m256i raised =
        _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(static_cast<char>(kRaise)), block);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(raised), _mm256_extracti128_si256(raised, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    meta[b].start = -_mm_cvtsi128_si32(sum);
    if (kOrder != CodeOrder::kPlain) _mm256_storeu_si256(at, _mm256_shuffle_epi8(block, code_order(kOrder)));
  }
  std::memcpy(meta + k / kMxBlock, &range, sizeof range);
}
