// One item of sink_attention, in the vector vocabulary: online softmax over steps of 64 keys that starts from the
// sink. Included inside a kernel's namespace and target region.

#include "simd/math.inl"

// All an item needs, on the stack of whichever thread runs it: 85 KB for head_dim 64, 280 KB for 256. kDim is
// head_dim rounded up to a size that is compiled for, so that rows lie close together.
template <int kDim>
struct AttentionState {
  float q[kAttentionRows][kDim];
  float acc[kAttentionRows][kDim];
  float p[kAttentionRows][kAttentionKeys];
  float kt[kDim][kAttentionKeys];  // keys transposed: lanes are keys in the scores
  float v[kAttentionKeys][kDim];
  float m[kAttentionRows], l[kAttentionRows];           // running maximum and denominator
  int64_t first[kAttentionRows], last[kAttentionRows];  // visible keys
};

template <typename T>
inline void widen(const T* from, int64_t n, float scale, float* to) {
  const f32v s = set1(scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    store(to + i, mul(load_n(from + i, count), s));
  }
}

// Keys and values [begin, end) of the step that starts at `base`, in float32; the step's other keys are zero.
template <typename T, int kDim>
inline void load_step(const AttentionItem& t, int64_t base, int64_t begin, int64_t end, AttentionState<kDim>& s) {
  for (int64_t j = 0; j < kAttentionKeys; ++j) {
    const int64_t key = base + j;
    float k_row[kDim];
    if (key < begin || key >= end) {
      for (int64_t d = 0; d < t.head_dim; ++d) s.kt[d][j] = 0.0f;
      for (int64_t d = 0; d < kDim; ++d) s.v[j][d] = 0.0f;
      continue;
    }
    const int64_t block = t.blocks[key / t.block_size];
    const int64_t row = (block * t.num_kv_heads + t.kv_head) * t.block_size + key % t.block_size;
    const bool scaled = t.k_scales != nullptr;
    widen(static_cast<const T*>(t.k) + row * t.head_dim, t.head_dim, scaled ? t.k_scales[row] : 1.0f, k_row);
    widen(static_cast<const T*>(t.v) + row * t.head_dim, t.head_dim, scaled ? t.v_scales[row] : 1.0f, s.v[j]);
    for (int64_t d = 0; d < t.head_dim; ++d) s.kt[d][j] = k_row[d];
  }
}

// p[r][j] = sm_scale * q[r] . k[j] for R rows. Every product is summed over the head in one order, and by parts,
// since a long chain of additions rounds more than a short one; with wide vectors a part must be longer to be worth
// its end.
template <int R, int kDim>
inline void scores(const AttentionItem& t, AttentionState<kDim>& s, int64_t row) {
  constexpr int kVectors = kAttentionKeys / kLanes < 4 ? kAttentionKeys / kLanes : 4;
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

// Turns a row's scores into weights against the running maximum and scales what was summed before.
template <int kDim>
inline void softmax_step(const AttentionItem& t, AttentionState<kDim>& s, int64_t row, int64_t base) {
  const f32v masked = set1(float_from_bits(0xff800000u));  // -infinity
  // Visible are base + j with first <= base + j <= last; the differences fit float32 exactly once bounded.
  const int64_t from = s.first[row] - base, to = s.last[row] - base;
  const f32v below = set1(static_cast<float>(from < 0 ? 0 : from));
  const f32v above = set1(static_cast<float>(to > kAttentionKeys ? kAttentionKeys : to));
  float* p = s.p[row];
  f32v largest = masked;
  for (int j = 0; j < kAttentionKeys; j += kLanes) {
    const f32v index = add(iota(), set1(static_cast<float>(j)));
    f32v x = select_lt(index, below, masked, load(p + j));
    x = select_lt(above, index, masked, x);
    largest = max(x, largest);
    store(p + j, x);
  }
  const float block_max = reduce_max(largest);
  const float m = s.m[row] < block_max ? block_max : s.m[row];
  f32v sum = zero();
  for (int j = 0; j < kAttentionKeys; j += kLanes) {
    const f32v e = exp(sub(load(p + j), set1(m)));
    sum = add(sum, e);
    store(p + j, e);
  }
  const float rescale = std::exp(s.m[row] - m);
  s.l[row] = s.l[row] * rescale + reduce_add(sum);
  s.m[row] = m;
  if (rescale == 1.0f) return;
  for (int64_t d = 0; d < t.head_dim; d += kLanes) store(&s.acc[row][d], mul(load(&s.acc[row][d]), set1(rescale)));
}

// acc[r] += sum_j p[r][j] v[j], keys in order. A row takes its visible keys only: 0 times a NaN or infinity that
// belongs to a neighbour would not be 0. The rows share their keys but for a few at the ends.
template <int R, int kDim>
inline void add_values(const AttentionItem& t, AttentionState<kDim>& s, int64_t row, int64_t base) {
  int64_t begin[R], end[R], shared_begin = 0, shared_end = kAttentionKeys;
  for (int r = 0; r < R; ++r) {
    begin[r] = s.first[row + r] < base ? 0 : s.first[row + r] - base;
    end[r] = s.last[row + r] - base < kAttentionKeys ? s.last[row + r] - base + 1 : kAttentionKeys;
    if (begin[r] > shared_begin) shared_begin = begin[r];
    if (end[r] < shared_end) shared_end = end[r];
  }
  if (shared_end < shared_begin) shared_end = shared_begin;
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    f32v sum[R];
    const auto add_own = [&](int r, int64_t from, int64_t to) {
      for (int64_t j = from; j < to; ++j) sum[r] = fma(set1(s.p[row + r][j]), load(&s.v[j][d]), sum[r]);
    };
    for (int r = 0; r < R; ++r) {
      sum[r] = load(&s.acc[row + r][d]);
      add_own(r, begin[r], end[r] < shared_begin ? end[r] : shared_begin);
    }
    for (int64_t j = shared_begin; j < shared_end; ++j) {
      const f32v v = load(&s.v[j][d]);
      for (int r = 0; r < R; ++r) sum[r] = fma(set1(s.p[row + r][j]), v, sum[r]);
    }
    for (int r = 0; r < R; ++r) {
      add_own(r, begin[r] > shared_end ? begin[r] : shared_end, end[r]);
      store(&s.acc[row + r][d], sum[r]);
    }
  }
}

template <typename T, int kDim>
inline void attend(const AttentionItem& t, AttentionState<kDim>& s, int64_t rows) {
  const int64_t begin = s.first[0], end = s.last[rows - 1] + 1;
  for (int64_t base = begin / kAttentionKeys * kAttentionKeys; base < end; base += kAttentionKeys) {
    load_step<T>(t, base, begin, end, s);
    // Rows are ordered by position: those that see nothing of this step stand at either end and are left alone, so
    // that they come out as if they had been alone.
    int64_t row = 0, stop = rows;
    while (row < stop && s.last[row] < base) ++row;
    while (stop > row && s.first[stop - 1] >= base + kAttentionKeys) --stop;
    constexpr int R = 4;
    for (int64_t r = row; r < stop;) {
      const int count = r + R <= stop ? R : 1;
      count == R ? scores<R>(t, s, r) : scores<1>(t, s, r);
      for (int i = 0; i < count; ++i) softmax_step(t, s, r + i, base);
      count == R ? add_values<R>(t, s, r, base) : add_values<1>(t, s, r, base);
      r += count;
    }
  }
}

template <int kDim>
inline void load_rows(const AttentionItem& t, AttentionState<kDim>& s) {
  for (int64_t i = 0; i < t.num_tokens; ++i) {
    for (int64_t h = 0; h < t.num_heads; ++h) {
      const int64_t row = i * t.num_heads + h, at = i * t.q_token_stride + h * t.head_dim;
      if (t.q_dtype == DType::f32) {
        widen(static_cast<const float*>(t.q) + at, t.head_dim, 1.0f, s.q[row]);
      } else {
        widen(static_cast<const bf16*>(t.q) + at, t.head_dim, 1.0f, s.q[row]);
      }
      for (int64_t d = 0; d < t.head_dim; d += kLanes) store(&s.acc[row][d], zero());
      // The sink is the first logit of the online softmax. A sink of -infinity counts nothing.
      const float lowest = -3.0e38f;
      s.m[row] = t.sinks[h] < lowest ? lowest : t.sinks[h];
      s.l[row] = t.sinks[h] < lowest ? 0.0f : 1.0f;
      s.last[row] = t.first_position + i;
      const int64_t oldest = s.last[row] - t.sliding_window + 1;
      s.first[row] = t.sliding_window > 0 && oldest > 0 ? oldest : 0;
    }
  }
}

template <int kDim>
inline void store_rows(const AttentionItem& t, const AttentionState<kDim>& s) {
  for (int64_t i = 0; i < t.num_tokens; ++i) {
    for (int64_t h = 0; h < t.num_heads; ++h) {
      const int64_t row = i * t.num_heads + h, at = i * t.y_token_stride + h * t.head_dim;
      const f32v l = set1(s.l[row]);
      for (int64_t d = 0; d < t.head_dim; d += kLanes) {
        const int count = static_cast<int>(t.head_dim - d < kLanes ? t.head_dim - d : kLanes);
        const f32v value = div(load(&s.acc[row][d]), l);
        if (t.y_dtype == DType::f32) {
          store_n(static_cast<float*>(t.y) + at + d, value, count);
        } else {
          store_n(static_cast<bf16*>(t.y) + at + d, value, count);
        }
      }
      if (t.sink_share != nullptr) {
        t.sink_share[i * t.share_token_stride + h] = std::exp(t.sinks[h] - s.m[row]) / s.l[row];
      }
    }
  }
}

template <int kDim>
inline void attention_of(const AttentionItem& t) {
  AttentionState<kDim> s;
  load_rows(t, s);
  const int64_t rows = t.num_tokens * t.num_heads;
  if (t.kv_dtype == DType::f32) attend<float>(t, s, rows);
  if (t.kv_dtype == DType::bf16) attend<bf16>(t, s, rows);
  if (t.kv_dtype == DType::i8) attend<int8_t>(t, s, rows);
  store_rows(t, s);
}

inline void attention_item(const AttentionItem& t) {
  if (t.head_dim <= 64) return attention_of<64>(t);
  if (t.head_dim <= 128) return attention_of<128>(t);
  attention_of<kMaxHeadDim>(t);
}
