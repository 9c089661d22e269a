// sink_attention over a bfloat16 cache: both products by pairs of bfloat16, queries and weights rounded to it. A
// weight is against the running maximum. Included inside the namespace of sink_attention_avx512x.cpp.

inline __m512bh as_pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }
inline __m512bh load_pairs(const uint32_t* p) { return as_pairs(_mm512_load_si512(p)); }
inline __m512bh broadcast_pair(const void* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return as_pairs(_mm512_set1_epi32(pair));
}
inline __m512i to_pairs(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

// acc[r][n] += sum of pairs a[r][i] . b[i][16 n, 16 n + 16) over i; rows are kStrideA bytes apart.
template <int64_t kStrideA, int64_t kStrideB>
inline void multiply_pairs(const void* a, const uint32_t* b, int64_t num_pairs, Ahead& ahead,
                           __m512 (&acc)[kTile][kVectors]) {
  const char* rows = static_cast<const char*>(a);
  for (int64_t i = 0; i < num_pairs; ++i) {
    ahead.some();
    __m512bh lanes[kVectors];
    for (int n = 0; n < kVectors; ++n) lanes[n] = load_pairs(b + i * kStrideB + n * kLanes);
    for (int r = 0; r < kTile; ++r) {
      const __m512bh pair = broadcast_pair(rows + r * kStrideA + 4 * i);
      for (int n = 0; n < kVectors; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], pair, lanes[n]);
    }
  }
}

template <int kDim>
struct Bf16Cache {
  using Value = bf16;
  using State = AttentionState<kDim>;
  static constexpr int64_t kPairs = kAttentionKeys / 2;

  static void load_row(const AttentionItem& t, State& s, int64_t row) {
    for (int64_t d = 0; d < kDim; d += kLanes) store(&s.q[row][d], load_query(t, row, d));
    set_unit(t, s, row, 1.0f);
  }

  static void stage_scales(const AttentionItem&, const Slots&, State&) {}

  // Places of the head that staged values fill, in their order.
  static int64_t staged_dim(const AttentionItem& t) { return (t.head_dim + 31) / 32 * 32; }

  template <bool kRun>
  static void stage_pairs(const AttentionItem& t, const Slots& slots, State& s) {
    const bf16* values = static_cast<const bf16*>(t.v);
    const int64_t head_dim = kRun ? kDim : t.head_dim;
    for (int64_t j = 0; j < kPairs; ++j) {
      s.ahead.some();
      const int64_t slot0 = kRun ? slots.v[0] + 2 * j : slots.value(2 * j);
      const int64_t slot1 = kRun ? slots.v[0] + 2 * j + 1 : slots.value(2 * j + 1);
      for (int64_t d = 0; d < kDim && d < (head_dim + 63) / 64 * 64; d += 32) {
        const __m512i v0 = load_slot<kRun>(values, slot0, d, head_dim);
        const __m512i v1 = load_slot<kRun>(values, slot1, d, head_dim);
        _mm512_store_si512(&s.v[j][d], _mm512_unpacklo_epi16(v0, v1));
        _mm512_store_si512(&s.v[j][d + kLanes], _mm512_unpackhi_epi16(v0, v1));
      }
    }
  }

  static bool all_finite(const AttentionItem& t, const State& s) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 found = 0;
    for (int64_t j = 0; j < kPairs; ++j) {
      for (int64_t d = 0; d < staged_dim(t); d += kLanes) {
        const __m512i pairs = _mm512_load_si512(&s.v[j][d]);
        found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
      }
    }
    return found == 0;
  }

  static void stage_values(const AttentionItem& t, const Slots& slots, bool seen_by_all, State& s) {
    const bool run = slots.run && t.head_dim == kDim;
    run ? stage_pairs<true>(t, slots, s) : stage_pairs<false>(t, slots, s);
    s.spreads_nan = !seen_by_all && !all_finite(t, s);
  }

  template <bool kMasked>
  MXMOE_INLINE static void score(const AttentionItem& t, State& s, int64_t row, int at, const uint64_t* visible) {
    __m512 x[kTile][kVectors];
    for (auto& of_row : x) {
      for (__m512& sum : of_row) sum = _mm512_setzero_ps();
    }
    multiply_pairs<sizeof s.q[0], kAttentionKeys>(s.q[row], s.k[0], (t.head_dim + 1) / 2, s.ahead, x);
    keep_scores<kMasked>(s, at, x, visible);
  }

  template <bool kMasked>
  static void weigh(State& s, int64_t row, int at, const uint64_t*) {
    const Tops top = raise_tops(s, row, at);
    for (int r = 0; r < kTile; ++r) {
      const __m512 largest = row_of(r, top.now), unit = _mm512_set1_ps(s.unit_of_2[row + r]);
      float* lane_sums = s.lane_sums[row + r];
      __m512 sum = _mm512_mul_ps(_mm512_load_ps(lane_sums), row_of(r, top.rescale));
      __m512 p[kVectors];
      for (int n = 0; n < kVectors; ++n) p[n] = _mm512_load_ps(&s.x[at + r][n * kLanes]);
      weigh_scores(p, largest, unit);
      for (int n = 0; n < kVectors; n += 2) {
        const __m512i pairs = to_pairs(p[n], p[n + 1]);
        _mm512_store_si512(&s.p[at + r][n * kLanes / 2], pairs);
        sum = _mm512_dpbf16_ps(sum, as_pairs(pairs), as_pairs(_mm512_set1_epi32(0x3f803f80)));  // times 1
      }
      _mm512_store_ps(lane_sums, sum);
    }
  }

  static void add_values(const AttentionItem& t, State& s, int64_t row, int at, const uint64_t* visible) {
    if (s.spreads_nan) return add_seen_values(t, s, row, at, visible);
    for (int64_t d = 0; d < t.head_dim; d += kVectors * kLanes) {
      __m512 acc[kTile][kVectors];
      for (int r = 0; r < kTile; ++r) {
        const __m512 rescale = _mm512_set1_ps(s.rescale[at + r]);
        for (int n = 0; n < kVectors; ++n) {
          acc[r][n] = _mm512_mul_ps(_mm512_loadu_ps(&s.chunk.acc[row + r][d + n * kLanes]), rescale);
        }
      }
      multiply_pairs<sizeof s.p[0], kDim>(s.p[at], &s.v[0][d], kPairs, s.ahead, acc);
      for (int r = 0; r < kTile; ++r) {
        for (int n = 0; n < kVectors; ++n) _mm512_storeu_ps(&s.chunk.acc[row + r][d + n * kLanes], acc[r][n]);
      }
    }
  }

  // The same where a value that some row does not see is a NaN or an infinity, which 0 times it would spread: every
  // row takes zeros for the values it does not see. The same sums in the same order.
  static void add_seen_values(const AttentionItem& t, State& s, int64_t row, int at, const uint64_t* visible) {
    for (int r = 0; r < kTile; ++r) {
      const __m512 rescale = _mm512_set1_ps(s.rescale[at + r]);
      for (int64_t d = 0; d < staged_dim(t); d += kLanes) {
        float* to = &s.chunk.acc[row + r][d];
        __m512 acc = _mm512_mul_ps(_mm512_loadu_ps(to), rescale);
        for (int64_t i = 0; i < kPairs; ++i) {
          const auto seen = static_cast<int>(visible[r] >> (2 * i)) & 3;
          const int mask = (seen & 1 ? 0x0000ffff : 0) | (seen & 2 ? ~0xffff : 0);
          const __m512i pairs = _mm512_and_si512(_mm512_load_si512(&s.v[i][d]), _mm512_set1_epi32(mask));
          acc = _mm512_dpbf16_ps(acc, broadcast_pair(&s.p[at + r][i]), as_pairs(pairs));
        }
        _mm512_storeu_ps(to, acc);
      }
    }
  }

  // Pairs of keys are made within the quarters of a vector, so that of 32 places in the head every other four come
  // first. Sums of a chunk keep that order to its end.
  static void put_in_order(float* acc) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t d = 0; d < kDim; d += 2 * kLanes) {
      const __m512 first = _mm512_loadu_ps(acc + d), second = _mm512_loadu_ps(acc + d + kLanes);
      _mm512_storeu_ps(acc + d, _mm512_permutex2var_ps(first, low, second));
      _mm512_storeu_ps(acc + d + kLanes, _mm512_permutex2var_ps(first, high, second));
    }
  }
};
