// The loops over K for a tile of activation rows and weight rows. Every output has accumulators of its own
// that see the steps of K in order, so its bits do not depend on the tile it was computed in. Included inside
// a kernel's namespace and target region, after dot_formats.inl.

// out[m * NR + n] = dot(activation row rows[m], weight row n0 + n).
template <class F, int MR, int NR>
inline void dot_tile(const PreparedRows& a, const int64_t* rows, const WeightRows& w, int64_t n0, int64_t k,
                     float* out) {
  typename F::Acc acc[MR][NR];
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) acc[m][n] = zero_acc(static_cast<typename F::Acc*>(nullptr));
  }
  const int64_t steps = k / F::kStep;
  for (int64_t step = 0; step < steps; ++step) {
    typename F::W weights[NR];
    for (int n = 0; n < NR; ++n) weights[n] = F::weight(w, n0 + n, step);
    for (int m = 0; m < MR; ++m) {
      const typename F::A activation = F::activation(a, rows[m], step);
      for (int n = 0; n < NR; ++n) F::mac(acc[m][n], activation, weights[n]);
    }
  }
  if constexpr (!F::kBlockScaled) {
    const int rest = static_cast<int>(k % F::kStep);
    if (rest > 0) {  // activations are zero-padded, weights are not
      typename F::W weights[NR];
      for (int n = 0; n < NR; ++n) weights[n] = F::weight_tail(w, n0 + n, steps, rest);
      for (int m = 0; m < MR; ++m) {
        const typename F::A activation = F::activation(a, rows[m], steps);
        for (int n = 0; n < NR; ++n) F::mac(acc[m][n], activation, weights[n]);
      }
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) out[m * NR + n] = finish(acc[m][n]);
  }
}

// Fetches some stored weight rows, before `end`: each is too short for the hardware to get going.
template <class F>
inline void fetch_rows(const WeightRows& w, int64_t begin, int rows, int64_t end, int64_t k) {
  if (w.packed) return;
  for (int64_t row = begin; row < begin + rows && row < end; ++row) {
    const char* values = static_cast<const char*>(w.values) + row * w.value_stride;
    for (int64_t at = 0; at < k * F::kBits / 8; at += 64) prefetch(values + at);
  }
}

// All outputs of rows [0, num_rows) x weight rows [n_begin, n_end), handed to emit(row index, weight row,
// value). A tile decodes NR weight rows once for MR activation rows.
template <class F, int MR, int NR, class Emit>
inline void for_each_dot(const PreparedRows& a, const int64_t* rows, int64_t num_rows, const WeightRows& w,
                         int64_t n_begin, int64_t n_end, int64_t k, const Emit& emit) {
  float tile[MR * NR];
  const bool few = num_rows <= MR;  // so few that memory is waited for
  if (few) fetch_rows<F>(w, n_begin, NR, n_end, k);
  for (int64_t n = n_begin; n < n_end;) {
    const bool full_n = n + NR <= n_end;
    if (few) fetch_rows<F>(w, n + NR, NR, n_end, k);
    const int width = full_n ? NR : 1;
    for (int64_t m = 0; m < num_rows;) {
      const bool full_m = m + MR <= num_rows;
      const int height = full_m ? MR : 1;
      if (full_m && full_n) {
        dot_tile<F, MR, NR>(a, rows + m, w, n, k, tile);
      } else if (full_n) {
        dot_tile<F, 1, NR>(a, rows + m, w, n, k, tile);
      } else if (full_m) {
        dot_tile<F, MR, 1>(a, rows + m, w, n, k, tile);
      } else {
        dot_tile<F, 1, 1>(a, rows + m, w, n, k, tile);
      }
      for (int i = 0; i < height; ++i) {
        for (int j = 0; j < width; ++j) emit(m + i, n + j, tile[i * width + j]);
      }
      m += height;
    }
    n += width;
  }
}
