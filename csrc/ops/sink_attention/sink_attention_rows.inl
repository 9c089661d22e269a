// What the kernels of sink_attention share, in the vector vocabulary: where keys lie, and the running softmax of a
// row, which begins at the sink and takes in the sums of one chunk of keys after the other. Included inside a
// kernel's namespace and target region, after simd/math.inl.

// Stands for -infinity as a maximum, so that differences of maxima are never NaN.
constexpr float kLowest = -3.0e38f;

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// How a query with these magnitudes is rounded for an int8 cache: to whole multiples of scale, 16256 at most, which
// is 128 * 127 and so the greatest number that splits in two int8 parts. The scale is NaN when a value is not finite.
struct QueryScale {
  float scale, inverse;  // inverse 0: all codes are 0
};
inline QueryScale query_scale(float amax, float not_finite) {
  const bool usable = amax > 1e-30f && not_finite == 0.0f;
  return {amax / 16256.0f + not_finite, usable ? 16256.0f / amax : 0.0f};
}

// Softmax and weighted values of every row: acc = sum of exp(s - m) v, l = sum of exp(s - m).
template <int kDim>
struct RowSums {
  float m[kAttentionRows], l[kAttentionRows];
  float acc[kAttentionRows][kDim];
};

inline int64_t num_rows(const AttentionItem& t) { return t.num_tokens * t.num_heads; }

// Keys that a row sees: [first, last]; none when last is negative. Rows of later tokens come later, so both grow with
// the row.
inline int64_t last_key(const AttentionItem& t, int64_t row) { return t.first_position + row / t.num_heads; }
inline int64_t first_key(const AttentionItem& t, int64_t row) {
  return t.sliding_window > 0 ? greater(0, last_key(t, row) - t.sliding_window + 1) : 0;
}

inline bool sees_chunk(const AttentionItem& t, int64_t row, int64_t chunk) {
  return last_key(t, row) >= chunk * kAttentionChunk && first_key(t, row) < (chunk + 1) * kAttentionChunk;
}

// Where the keys of a step and their values lie, in rows of head_dim values from the caches' starts; -1 for none. An
// int8 cache's scales have the places of its keys.
struct Slots {
  int64_t k[kAttentionKeys], v[kAttentionKeys];  // of a run the first alone
  bool run;                                      // they follow each other
  int64_t key(int64_t j) const { return run ? k[0] + j : k[j]; }
  int64_t value(int64_t j) const { return run ? v[0] + j : v[j]; }
};

// Finds the step that starts at `base`, if it is a run and has some of the keys [begin, end). Keys beside those that
// are in the same block come with it: nobody sees them.
inline bool locate_run(const AttentionItem& t, int64_t base, int64_t begin, int64_t end, Slots& slots) {
  if (base + kAttentionKeys <= begin || base >= end || t.k_rows.key != 1 || t.v_rows.key != 1) return false;
  const int64_t place = base + t.key_start, block = place / t.block_size, offset = place - block * t.block_size;
  if (offset + kAttentionKeys > t.block_size) return false;
  slots.k[0] = t.k_rows.of(t.blocks[block], t.kv_head, offset);
  slots.v[0] = t.v_rows.of(t.blocks[block], t.kv_head, offset);
  return true;
}

// Finds the keys [begin, end) of the step that starts at `base`.
inline void locate(const AttentionItem& t, int64_t base, int64_t begin, int64_t end, Slots& slots) {
  slots.run = locate_run(t, base, begin, end, slots);
  if (slots.run) return;
  const CacheRows k_rows = t.k_rows, v_rows = t.v_rows;  // copies, which no store below can change
  const int64_t stop = lesser(end, base + kAttentionKeys);
  int64_t key = greater(begin, base);
  for (int64_t j = 0; j < key - base; ++j) slots.k[j] = slots.v[j] = -1;
  for (int64_t j = greater(stop, key) - base; j < kAttentionKeys; ++j) slots.k[j] = slots.v[j] = -1;
  while (key < stop) {
    const int64_t place = key + t.key_start, block = place / t.block_size, offset = place - block * t.block_size;
    const int64_t k = k_rows.of(t.blocks[block], t.kv_head, offset);
    const int64_t v = v_rows.of(t.blocks[block], t.kv_head, offset);
    const int64_t count = lesser(stop - key, t.block_size - offset);
    for (int64_t i = 0; i < count; ++i) slots.k[key - base + i] = k + i * k_rows.key;
    for (int64_t i = 0; i < count; ++i) slots.v[key - base + i] = v + i * v_rows.key;
    key += count;
  }
}

// Asks for key number j of a step and its value ahead of their use.
inline void prefetch_slot(const AttentionItem& t, const Slots& slots, int64_t j, int64_t row_bytes) {
  const int64_t key = slots.key(j), value = slots.value(j);
  if (key < 0) return;
  for (int64_t i = 0; i < row_bytes; i += 64) {
    prefetch(static_cast<const char*>(t.k) + key * row_bytes + i);
    prefetch(static_cast<const char*>(t.v) + value * row_bytes + i);
  }
}

// The sink is the first logit, without a value. A sink of -infinity counts nothing.
template <int kDim>
inline void begin_at_sinks(const AttentionItem& t, RowSums<kDim>& s) {
  for (int64_t row = 0; row < num_rows(t); ++row) {
    const float sink = t.sinks[row % t.num_heads];
    s.m[row] = sink < kLowest ? kLowest : sink;
    s.l[row] = sink < kLowest ? 0.0f : 1.0f;
    for (int64_t d = 0; d < t.head_dim; d += kLanes) store(&s.acc[row][d], zero());
  }
}

// Takes the sums of one chunk into a row's.
template <int kDim>
inline void add_chunk(const AttentionItem& t, RowSums<kDim>& s, int64_t row, float m, float l, const float* acc) {
  const float top = s.m[row] < m ? m : s.m[row];
  const f32v before = exp(set1(s.m[row] - top)), added = exp(set1(m - top));
  s.m[row] = top;
  store_n(&s.l[row], fma(added, set1(l), mul(before, set1(s.l[row]))), 1);
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    store(&s.acc[row][d], fma(added, load(acc + d), mul(before, load(&s.acc[row][d]))));
  }
}

template <int kDim>
inline void store_rows(const AttentionItem& t, const RowSums<kDim>& s) {
  for (int64_t row = 0; row < num_rows(t); ++row) {
    const int64_t i = row / t.num_heads, h = row % t.num_heads;
    const int64_t at = i * t.y_token_stride + h * t.head_dim;
    const float total = last_key(t, row) < 0 ? 1.0f : s.l[row];  // of no key and a sink of -infinity it is 0
    const f32v l = set1(total);
    for (int64_t d = 0; d < t.head_dim; d += kLanes) {
      const int count = static_cast<int>(lesser(t.head_dim - d, kLanes));
      const f32v value = div(load(&s.acc[row][d]), l);
      if (t.y_dtype == DType::f32) {
        store_n(static_cast<float*>(t.y) + at + d, value, count);
      } else {
        store_n(static_cast<bf16*>(t.y) + at + d, value, count);
      }
    }
    if (t.sink_share != nullptr) {
      t.sink_share[i * t.share_token_stride + h] = std::exp(t.sinks[h] - s.m[row]) / total;
    }
  }
}

// Hands the sums of one chunk to add_chunk, or to the buffer it will be called on when chunks are computed apart.
// Rows that see nothing of the chunk are left alone, so that they come out as if their item had been without it.
template <int kDim>
inline void finish_chunk(const AttentionItem& t, int64_t chunk, const RowSums<kDim>& sums, RowSums<kDim>& total) {
  for (int64_t row = 0; row < num_rows(t); ++row) {
    if (!sees_chunk(t, row, chunk)) continue;
    if (t.partial == nullptr) {
      add_chunk(t, total, row, sums.m[row], sums.l[row], sums.acc[row]);
      continue;
    }
    float* to = t.partial + ((chunk - t.partial_chunk) * num_rows(t) + row) * partial_size(t.head_dim);
    to[0] = sums.m[row], to[1] = sums.l[row];
    std::memcpy(to + kPartialHead, sums.acc[row], static_cast<size_t>(t.head_dim) * sizeof(float));
  }
}

template <int kDim>
inline void merge_of(const AttentionItem& t) {
  RowSums<kDim> total;
  begin_at_sinks(t, total);
  const float* from = t.partial;
  for (int64_t chunk = t.begin_chunk; chunk < t.end_chunk; ++chunk) {
    for (int64_t row = 0; row < num_rows(t); ++row, from += partial_size(t.head_dim)) {
      if (sees_chunk(t, row, chunk)) add_chunk(t, total, row, from[0], from[1], from + kPartialHead);
    }
  }
  store_rows(t, total);
}

// Reads the partial sums of chunks [begin_chunk, end_chunk) and writes the result.
inline void merge_chunks(const AttentionItem& t) {
  if (t.head_dim <= 64) return merge_of<64>(t);
  if (t.head_dim <= 128) return merge_of<128>(t);
  merge_of<kMaxHeadDim>(t);
}
