// sink_attention over an int8 cache: both products by quads of integers, whose sums over a step are exact. Queries
// are whole numbers of 15 bits with their sign, weights (against the largest of the step, times their values' scales)
// of 16 without; both go in as a high part and a low one. Included inside the namespace of
// sink_attention_avx512x.cpp.

// vpdpbusd. Around the intrinsic GCC copies every accumulator of the loop below, and spills some.
inline __m512i dot_quads(__m512i acc, __m512i of_unsigned, __m512i of_signed) {
#if defined(__GNUC__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(of_unsigned), "v"(of_signed));
  return acc;
#else
  return _mm512_dpbusd_epi32(acc, of_unsigned, of_signed);
#endif
}

// acc[r][n] += sum of quads a[r][i] . b[i][16 n, 16 n + 16) over i; rows are kStrideA bytes apart. With kKeys b is
// unsigned, else a.
template <bool kKeys, int64_t kStrideA, int64_t kStrideB>
inline void multiply_quads(const void* a, const uint32_t* b, int64_t num_quads, Ahead& ahead,
                           __m512i (&acc)[kTile][kVectors]) {
  const char* rows = static_cast<const char*>(a);
  for (int64_t i = 0; i < num_quads; ++i) {
    ahead.some();
    __m512i lanes[kVectors];
    for (int n = 0; n < kVectors; ++n) lanes[n] = _mm512_load_si512(b + i * kStrideB + n * kLanes);
    for (int r = 0; r < kTile; ++r) {
      int32_t quad;
      std::memcpy(&quad, rows + r * kStrideA + 4 * i, sizeof quad);
      const __m512i one = _mm512_set1_epi32(quad);
      for (int n = 0; n < kVectors; ++n) {
        acc[r][n] = kKeys ? dot_quads(acc[r][n], lanes[n], one) : dot_quads(acc[r][n], one, lanes[n]);
      }
    }
  }
}

template <int kBits>
inline void move_up(__m512i (&acc)[kTile][kVectors]) {
  for (auto& of_row : acc) {
    for (__m512i& sum : of_row) sum = _mm512_slli_epi32(sum, kBits);
  }
}

// A step's weights are whole numbers up to 32768, so that equal ones stay equal to 1: by what they become those, and
// what a code then stands for. That is NaN where the largest weight is NaN or negative.
inline __m512 codes_of(__m512 largest) { return _mm512_div_ps(_mm512_set1_ps(32768.0f), largest); }
inline __m512 unit_of_codes(__m512 largest) {
  const __mmask16 usable = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_GE_OQ);
  const __m512 nan = _mm512_set1_ps(float_from_bits(0x7fc00000u));
  return _mm512_mask_mul_ps(nan, usable, largest, _mm512_set1_ps(1.0f / 32768.0f));
}

template <int kDim>
struct Int8Cache {
  using Value = int8_t;
  using State = AttentionState<kDim>;
  static constexpr int64_t kQuads = kAttentionKeys / 4;

  static void load_row(const AttentionItem& t, State& s, int64_t row) {
    f32v largest = zero(), poison = zero();
    for (int64_t d = 0; d < t.head_dim; d += kLanes) {
      const f32v q = load_query(t, row, d);
      largest = max(abs(q), largest);
      poison = fma(q, zero(), poison);  // NaN once a value is not finite
    }
    const QueryScale scale = query_scale(reduce_max(largest), reduce_add(poison));
    set_unit(t, s, row, scale.scale);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < kDim; d += kLanes) {
      const f32v q = scale.inverse == 0.0f ? zero() : mul(load_query(t, row, d), set1(scale.inverse));
      const __m512i code = _mm512_cvtps_epi32(q.v);  // rounds to nearest, ties to even
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(64)), 7);
      const __m512i low = _mm512_sub_epi32(code, _mm512_slli_epi32(high, 7));
      _mm_store_si128(reinterpret_cast<__m128i*>(&s.q_high[row][d]), _mm512_cvtepi32_epi8(high));
      _mm_store_si128(reinterpret_cast<__m128i*>(&s.q_low[row][d]), _mm512_cvtepi32_epi8(low));
      sum = _mm512_add_epi32(sum, code);
    }
    s.q_start[row] = -_mm512_reduce_add_epi32(sum);  // -128 times it once it has been moved up
  }

  static void stage_scales(const AttentionItem& t, const Slots& slots, State& s) {
    if (slots.run) {
      for (int64_t j = 0; j < kAttentionKeys; j += kLanes) {
        _mm512_store_ps(s.k_scale + j, _mm512_loadu_ps(t.k_scales + slots.k[0] + j));
        _mm512_store_ps(s.v_scale + j, _mm512_loadu_ps(t.v_scales + slots.k[0] + j));
      }
    } else {
      for (int64_t j = 0; j < kAttentionKeys; ++j) {
        const int64_t slot = slots.key(j);
        s.k_scale[j] = slot < 0 ? 0.0f : t.k_scales[slot];
        s.v_scale[j] = slot < 0 ? 0.0f : t.v_scales[slot];
      }
    }
  }

  // Quads of keys, in the order that pack_weights takes.
  template <bool kRun>
  static void stage_quads(const AttentionItem& t, const Slots& slots, State& s) {
    const int8_t* values = static_cast<const int8_t*>(t.v);
    const int64_t head_dim = kRun ? kDim : t.head_dim;
    const int64_t first = kRun ? slots.v[0] : 0;
    for (int64_t i = 0; i < kQuads; ++i) {
      s.ahead.some();
      const int64_t key = i % kVectors * kLanes + i / kVectors * 4;
      for (int64_t d = 0; d < head_dim; d += 64) {
        __m512i v[4];
        for (int j = 0; j < 4; ++j) {
          v[j] = load_slot<kRun>(values, kRun ? first + key + j : slots.value(key + j), d, head_dim);
        }
        const __m512i low01 = _mm512_unpacklo_epi8(v[0], v[1]), high01 = _mm512_unpackhi_epi8(v[0], v[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(v[2], v[3]), high23 = _mm512_unpackhi_epi8(v[2], v[3]);
        uint32_t* to = &s.v[i][d];
        _mm512_store_si512(to, _mm512_unpacklo_epi16(low01, low23));
        _mm512_store_si512(to + kLanes, _mm512_unpackhi_epi16(low01, low23));
        _mm512_store_si512(to + 2 * kLanes, _mm512_unpacklo_epi16(high01, high23));
        _mm512_store_si512(to + 3 * kLanes, _mm512_unpackhi_epi16(high01, high23));
      }
    }
  }

  static void stage_values(const AttentionItem& t, const Slots& slots, bool, State& s) {
    const bool run = slots.run && t.head_dim == kDim;
    run ? stage_quads<true>(t, slots, s) : stage_quads<false>(t, slots, s);
  }

  template <bool kMasked>
  MXMOE_INLINE static void score(const AttentionItem& t, State& s, int64_t row, int at, const uint64_t* visible) {
    __m512i acc[kTile][kVectors];
    for (int r = 0; r < kTile; ++r) {
      for (__m512i& sum : acc[r]) sum = _mm512_set1_epi32(s.q_start[row + r]);
    }
    const int64_t num_quads = (t.head_dim + 3) / 4;
    multiply_quads<true, kDim, kAttentionKeys>(s.q_high[row], s.k[0], num_quads, s.ahead, acc);
    move_up<7>(acc);
    multiply_quads<true, kDim, kAttentionKeys>(s.q_low[row], s.k[0], num_quads, s.ahead, acc);
    __m512 x[kTile][kVectors];
    for (int r = 0; r < kTile; ++r) {
      for (int n = 0; n < kVectors; ++n) {
        x[r][n] = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][n]), _mm512_load_ps(s.k_scale + n * kLanes));
      }
    }
    keep_scores<kMasked>(s, at, x, visible);
  }

  // Weights against the largest of the step into the denominator, and times their values' scales into the scores'
  // place.
  template <bool kMasked>
  static void weigh(State& s, int64_t row, int at, const uint64_t* visible) {
    const __m512 units = load_rows_of(&s.unit_of_2[row]), tops = load_rows_of(&s.largest[at]);
    const Tops running = raise_tops(s, row, at);
    const __m512 shares = weight_of(tops, running.now, units);
    __m512 largest[kTile];
    for (int r = 0; r < kTile; ++r) {
      const __m512 top = _mm512_set1_ps(s.largest[at + r]), unit = _mm512_set1_ps(s.unit_of_2[row + r]);
      __m512 p[kVectors], sum = _mm512_setzero_ps();
      for (int n = 0; n < kVectors; ++n) p[n] = _mm512_load_ps(&s.x[at + r][n * kLanes]);
      weigh_scores(p, top, unit);
      largest[r] = _mm512_setzero_ps();
      for (int n = 0; n < kVectors; ++n) {
        sum = _mm512_add_ps(sum, p[n]);
        // A NaN for a scale must not pass through a weight of 0, nor a sign of 0 for that of a number.
        const __mmask16 seen = kMasked ? lanes_of(visible[r], n) : ~__mmask16{0};
        p[n] = _mm512_maskz_fmadd_ps(seen, p[n], _mm512_load_ps(s.v_scale + n * kLanes), _mm512_setzero_ps());
        _mm512_store_ps(&s.x[at + r][n * kLanes], p[n]);
        largest[r] = ByBits::max(largest[r], p[n]);
      }
      float* lane_sums = s.lane_sums[row + r];
      const __m512 before = _mm512_mul_ps(_mm512_load_ps(lane_sums), row_of(r, running.rescale));
      _mm512_store_ps(lane_sums, _mm512_fmadd_ps(sum, row_of(r, shares), before));
    }
    const __m512 most = max_by_rows<ByBits>(largest);
    store_rows_of(&s.code_scale[at], codes_of(most));
    store_rows_of(&s.p_unit[at], _mm512_mul_ps(shares, unit_of_codes(most)));
  }

  // The weights as codes, high bytes and low ones, with four keys in a dword. What is no number becomes 0 on the way.
  static void pack_weights(State& s, int at) {
    for (int r = 0; r < kTile; ++r) {
      const __m512 scale = _mm512_set1_ps(s.code_scale[at + r]);
      __m512i code[kVectors];
      for (int n = 0; n < kVectors; ++n) {
        code[n] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(&s.x[at + r][n * kLanes]), scale));
      }
      const __m512i first = _mm512_packus_epi32(code[0], code[1]), second = _mm512_packus_epi32(code[2], code[3]);
      const __m512i byte = _mm512_set1_epi16(0xff);
      _mm512_store_si512(&s.p[at + r][0],
                         _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)));
      _mm512_store_si512(&s.p[at + r][kQuads],
                         _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte)));
    }
  }

  static void add_values(const AttentionItem& t, State& s, int64_t row, int at, const uint64_t*) {
    pack_weights(s, at);
    for (int64_t d = 0; d < t.head_dim; d += kVectors * kLanes) {
      __m512i acc[kTile][kVectors];
      for (auto& of_row : acc) {
        for (__m512i& sum : of_row) sum = _mm512_setzero_si512();
      }
      multiply_quads<false, sizeof s.p[0], kDim>(s.p[at], &s.v[0][d], kQuads, s.ahead, acc);
      move_up<8>(acc);
      multiply_quads<false, sizeof s.p[0], kDim>(s.p[at] + kQuads, &s.v[0][d], kQuads, s.ahead, acc);
      for (int r = 0; r < kTile; ++r) {
        const __m512 unit = _mm512_set1_ps(s.p_unit[at + r]), rescale = _mm512_set1_ps(s.rescale[at + r]);
        for (int n = 0; n < kVectors; ++n) {
          float* to = &s.chunk.acc[row + r][d + n * kLanes];
          const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(to), rescale);
          _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][n]), unit, before));
        }
      }
    }
  }

  // Quads are made within the quarters of a vector: of 64 places in the head the first four of each quarter come
  // first.
  static void put_in_order(float* acc) {
    for (int64_t d = 0; d < kDim; d += 4 * kLanes) {
      __m512 x[4];
      for (int n = 0; n < 4; ++n) x[n] = _mm512_loadu_ps(acc + d + n * kLanes);
      const __m512 low01 = _mm512_shuffle_f32x4(x[0], x[1], 0x44), high01 = _mm512_shuffle_f32x4(x[0], x[1], 0xee);
      const __m512 low23 = _mm512_shuffle_f32x4(x[2], x[3], 0x44), high23 = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
      _mm512_storeu_ps(acc + d, _mm512_shuffle_f32x4(low01, low23, 0x88));
      _mm512_storeu_ps(acc + d + kLanes, _mm512_shuffle_f32x4(low01, low23, 0xdd));
      _mm512_storeu_ps(acc + d + 2 * kLanes, _mm512_shuffle_f32x4(high01, high23, 0x88));
      _mm512_storeu_ps(acc + d + 3 * kLanes, _mm512_shuffle_f32x4(high01, high23, 0xdd));
    }
  }
};
