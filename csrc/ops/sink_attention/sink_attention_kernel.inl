// One item of sink_attention in float32, in the vector vocabulary: online softmax over steps of 64 keys. With
// Rounded, queries and weights carry the values that the contract rounds them to. Included inside a kernel's
// namespace and target region.

#include "simd/math.inl"
#include "ops/sink_attention/sink_attention_rows.inl"

// All an item needs, on the stack of whichever thread runs it: 102 KB for head_dim 64, 348 KB for 256. kDim is
// head_dim rounded up to a size that is compiled for, so that rows lie close together.
template <int kDim>
struct AttentionState {
  float q[kAttentionRows][kDim];
  RowSums<kDim> total, chunk;
  float p[kAttentionRows][kAttentionKeys];
  float kt[kDim][kAttentionKeys];  // keys transposed: lanes are keys in the scores
  float v[kAttentionKeys][kDim];
  float k_scale[kAttentionKeys], v_scale[kAttentionKeys];
  Slots slots[2];                                       // of this step and the next
  int64_t first[kAttentionRows], last[kAttentionRows];  // visible keys
};

// What a value becomes when it enters a product.
template <bool Rounded>
inline f32v rounded(f32v x) {
  return Rounded ? rounded_to_bf16(x) : x;
}

// kLanes keys, whose first is key j of the step, from the cache to columns of kt.
template <typename T, int kDim>
inline void load_keys(const AttentionItem& t, const Slots& slots, int64_t j, AttentionState<kDim>& s) {
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    const int count = static_cast<int>(lesser(t.head_dim - d, kLanes));
    f32v rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t slot = slots.key(j + i);
      rows[i] = slot < 0 ? zero() : load_n(static_cast<const T*>(t.k) + slot * t.head_dim + d, count);
    }
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) store(&s.kt[d + i][j], rows[i]);
  }
}

// Keys and values of a step, in float32; where a slot is -1 they are zero.
template <typename T, int kDim>
inline void load_step(const AttentionItem& t, const Slots& slots, const Slots& next_slots, AttentionState<kDim>& s) {
  for (int64_t j = 0; j < kAttentionKeys; j += kLanes) load_keys<T>(t, slots, j, s);
  for (int64_t j = 0; j < kAttentionKeys; ++j) {
    prefetch_slot(t, next_slots, j, t.head_dim * static_cast<int64_t>(sizeof(T)));
    const int64_t slot = slots.value(j);
    for (int64_t d = 0; d < t.head_dim; d += kLanes) {
      const int count = static_cast<int>(lesser(t.head_dim - d, kLanes));
      store(&s.v[j][d], slot < 0 ? zero() : load_n(static_cast<const T*>(t.v) + slot * t.head_dim + d, count));
    }
    if (t.k_scales == nullptr) continue;
    s.k_scale[j] = slot < 0 ? 0.0f : t.k_scales[slots.key(j)];
    s.v_scale[j] = slot < 0 ? 0.0f : t.v_scales[slots.key(j)];
  }
}

// p[r][j] = sm_scale * q[r] . k[j] for R rows. Every product is summed over the head in one order, and by parts,
// since a long chain of additions rounds more than a short one; with wide vectors a part must be longer to be worth
// its end.
template <int R, int kDim>
inline void scores(const AttentionItem& t, AttentionState<kDim>& s, int64_t row) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2;  // R x kVectors sums stay in registers
  constexpr int64_t kPart = 4 * kLanes;
  for (int j = 0; j < kAttentionKeys; j += kVectors * kLanes) {
    for (int64_t part = 0; part < t.head_dim; part += kPart) {
      const int64_t end = part + kPart < t.head_dim ? part + kPart : t.head_dim;
      f32v sum[R][kVectors];
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < kVectors; ++c) sum[r][c] = zero();
      }
      for (int64_t d = part; d < end; ++d) {
        f32v k[kVectors];
        for (int c = 0; c < kVectors; ++c) k[c] = load(&s.kt[d][j + c * kLanes]);
        for (int r = 0; r < R; ++r) {
          const f32v q = set1(s.q[row + r][d]);
          for (int c = 0; c < kVectors; ++c) sum[r][c] = fma(q, k[c], sum[r][c]);
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < kVectors; ++c) {
          float* p = &s.p[row + r][j + c * kLanes];
          const f32v total = part == 0 ? sum[r][c] : add(load(p), sum[r][c]);
          store(p, end == t.head_dim ? mul(total, set1(t.sm_scale)) : total);
        }
      }
    }
  }
}

// Turns a row's scores into weights against the running maximum and scales what was summed before. The denominator
// sums the weights as they multiply the values, but for an int8 cache, where they take the value's scale on as well.
template <bool Rounded, int kDim>
inline void softmax_step(const AttentionItem& t, AttentionState<kDim>& s, int64_t row, int64_t base) {
  const f32v masked = set1(float_from_bits(0xff800000u));  // -infinity
  const bool scaled = t.k_scales != nullptr;
  // Visible are base + j with first <= base + j <= last; the differences fit float32 exactly once bounded.
  const f32v below = set1(static_cast<float>(greater(s.first[row] - base, 0)));
  const f32v above = set1(static_cast<float>(lesser(s.last[row] - base, kAttentionKeys)));
  const bool all = s.first[row] <= base && s.last[row] >= base + kAttentionKeys - 1;
  float* p = s.p[row];
  f32v largest = masked;
  for (int j = 0; j < kAttentionKeys; j += kLanes) {
    f32v x = scaled ? mul(load(p + j), load(s.k_scale + j)) : load(p + j);
    if (!all) {
      const f32v index = add(iota(), set1(static_cast<float>(j)));
      x = select_lt(index, below, masked, x);
      x = select_lt(above, index, masked, x);
    }
    largest = max(x, largest);
    store(p + j, x);
  }
  const float before = s.chunk.m[row], step_max = reduce_max(largest), m = before < step_max ? step_max : before;
  f32v sum = zero();
  for (int j = 0; j < kAttentionKeys; j += kLanes) {
    f32v e = exp_of_no_more_than_0(sub(load(p + j), set1(m)));
    if (!scaled) e = rounded<Rounded>(e);
    sum = add(sum, e);
    store(p + j, scaled ? rounded<Rounded>(mul(e, load(s.v_scale + j))) : e);
  }
  s.chunk.m[row] = m;
  const f32v rescale = before == m ? set1(1.0f) : exp_of_no_more_than_0(set1(before - m));
  store_n(&s.chunk.l[row], fma(set1(s.chunk.l[row]), rescale, set1(reduce_add(sum))), 1);
  if (before == m) return;
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    store(&s.chunk.acc[row][d], mul(load(&s.chunk.acc[row][d]), rescale));
  }
}

// The keys of a step that R rows see: each row [begin, end), all of them [shared_begin, shared_end).
template <int R>
struct SeenKeys {
  int64_t begin[R], end[R], shared_begin, shared_end;
};

// acc[r] += sum_j p[r][j] v[j] for C vectors of the head. Pointers, since GCC 12's choice of induction variables
// loses the sums of `s.chunk.acc[row + r][d]` for kDim 128.
template <int R, int C, int kDim>
inline void add_columns(const SeenKeys<R>& keys, const float* p, const float* v, float* acc) {
  f32v sum[R][C];
  const auto add_keys = [&](int r, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j) {
      const f32v weight = set1(p[r * kAttentionKeys + j]);
      for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, load(v + j * kDim + c * kLanes), sum[r][c]);
    }
  };
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = zero();
    add_keys(r, keys.begin[r], lesser(keys.end[r], keys.shared_begin));
  }
  for (int64_t j = keys.shared_begin; j < keys.shared_end; ++j) {
    f32v shared[C];
    for (int c = 0; c < C; ++c) shared[c] = load(v + j * kDim + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const f32v weight = set1(p[r * kAttentionKeys + j]);
      for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, shared[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    add_keys(r, greater(keys.begin[r], keys.shared_end), keys.end[r]);
    for (int c = 0; c < C; ++c) {
      float* to = acc + r * kDim + c * kLanes;
      store(to, add(load(to), sum[r][c]));
    }
  }
}

// acc[r] += sum_j p[r][j] v[j], keys in order and from zero: a long chain of additions rounds more. A row takes its
// visible keys only: 0 times a NaN or infinity that belongs to a neighbour would not be 0. The rows share their keys
// but for a few at the ends.
template <int R, int kDim>
inline void add_values(const AttentionItem& t, AttentionState<kDim>& s, int64_t row, int64_t base) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2;  // R x kVectors sums stay in registers
  SeenKeys<R> keys{{}, {}, 0, kAttentionKeys};
  for (int r = 0; r < R; ++r) {
    keys.begin[r] = greater(s.first[row + r] - base, 0);
    keys.end[r] = lesser(s.last[row + r] - base + 1, kAttentionKeys);
    keys.shared_begin = greater(keys.begin[r], keys.shared_begin);
    keys.shared_end = lesser(keys.end[r], keys.shared_end);
  }
  keys.shared_end = greater(keys.shared_begin, keys.shared_end);
  const float *p = s.p[row], *v = s.v[0];
  float* acc = s.chunk.acc[row];
  int64_t d = 0;
  for (; d + kVectors * kLanes <= t.head_dim; d += kVectors * kLanes) {
    add_columns<R, kVectors, kDim>(keys, p, v + d, acc + d);
  }
  for (; d < t.head_dim; d += kLanes) add_columns<R, 1, kDim>(keys, p, v + d, acc + d);
}

// One step for rows [row, stop): as many at once as share the work well, the rest alone.
template <bool Rounded, int kDim>
inline void attend_step(const AttentionItem& t, AttentionState<kDim>& s, int64_t base) {
  // Rows that see nothing of this step stand at either end and are left alone, so that they come out as if they had
  // been alone.
  int64_t row = 0, stop = num_rows(t);
  while (row < stop && s.last[row] < base) ++row;
  while (stop > row && s.first[stop - 1] >= base + kAttentionKeys) --stop;
  constexpr int R = 4;
  while (row < stop) {
    const int count = row + R <= stop ? R : 1;
    count == R ? scores<R>(t, s, row) : scores<1>(t, s, row);
    for (int i = 0; i < count; ++i) softmax_step<Rounded>(t, s, row + i, base);
    count == R ? add_values<R>(t, s, row, base) : add_values<1>(t, s, row, base);
    row += count;
  }
}

template <bool Rounded, typename T, int kDim>
inline void attend_chunk(const AttentionItem& t, AttentionState<kDim>& s, int64_t chunk) {
  for (int64_t row = 0; row < num_rows(t); ++row) {
    s.chunk.m[row] = kLowest, s.chunk.l[row] = 0.0f;
    for (int64_t d = 0; d < t.head_dim; d += kLanes) store(&s.chunk.acc[row][d], zero());
  }
  const int64_t begin = greater(s.first[0], chunk * kAttentionChunk);
  const int64_t end = lesser(s.last[num_rows(t) - 1] + 1, (chunk + 1) * kAttentionChunk);
  int64_t base = begin / kAttentionKeys * kAttentionKeys;
  locate(t, base, begin, end, s.slots[0]);
  for (int now = 0; base < end; base += kAttentionKeys, now ^= 1) {
    locate(t, base + kAttentionKeys, begin, end, s.slots[now ^ 1]);
    load_step<T>(t, s.slots[now], s.slots[now ^ 1], s);
    attend_step<Rounded>(t, s, base);
  }
}

template <int kDim>
inline void round_query(const AttentionItem& t, float (&q)[kDim]) {
  f32v largest = zero(), poison = zero();
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    const f32v x = load_n(q + d, static_cast<int>(lesser(t.head_dim - d, kLanes)));
    largest = max(abs(x), largest);
    poison = add(mul(x, zero()), poison);  // NaN once a value is not finite
  }
  const QueryScale scale = query_scale(reduce_max(largest), reduce_add(poison));
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    const f32v code = scale.inverse == 0.0f ? zero() : round(mul(load(q + d), set1(scale.inverse)));
    store(q + d, mul(code, set1(scale.scale)));
  }
}

template <bool Rounded, int kDim>
inline void load_rows(const AttentionItem& t, AttentionState<kDim>& s) {
  for (int64_t row = 0; row < num_rows(t); ++row) {
    const int64_t at = row / t.num_heads * t.q_token_stride + row % t.num_heads * t.head_dim;
    for (int64_t d = 0; d < t.head_dim; d += kLanes) {
      const int count = static_cast<int>(lesser(t.head_dim - d, kLanes));
      const f32v q = t.q_dtype == DType::f32 ? load_n(static_cast<const float*>(t.q) + at + d, count)
                                             : load_n(static_cast<const bf16*>(t.q) + at + d, count);
      store(&s.q[row][d], t.kv_dtype == DType::bf16 ? rounded<Rounded>(q) : q);
    }
    if (Rounded && t.kv_dtype == DType::i8) round_query(t, s.q[row]);
    s.first[row] = first_key(t, row), s.last[row] = last_key(t, row);
  }
}

template <bool Rounded, int kDim>
inline void attention_of(const AttentionItem& t) {
  AttentionState<kDim> s;
  load_rows<Rounded>(t, s);
  begin_at_sinks(t, s.total);
  for (int64_t chunk = t.begin_chunk; chunk < t.end_chunk; ++chunk) {
    if (t.kv_dtype == DType::f32) attend_chunk<false, float>(t, s, chunk);
    if (t.kv_dtype == DType::bf16) attend_chunk<Rounded, bf16>(t, s, chunk);
    if (t.kv_dtype == DType::i8) attend_chunk<Rounded, int8_t>(t, s, chunk);
    finish_chunk(t, chunk, s.chunk, s.total);
  }
  if (t.partial == nullptr) store_rows(t, s.total);
}

template <bool Rounded>
inline void attention_item(const AttentionItem& t) {
  if (t.head_dim <= 64) return attention_of<Rounded, 64>(t);
  if (t.head_dim <= 128) return attention_of<Rounded, 128>(t);
  attention_of<Rounded, kMaxHeadDim>(t);
}

constexpr AttentionKernels kAttention = {{attention_item<false>, merge_chunks}, {attention_item<true>, merge_chunks}};
