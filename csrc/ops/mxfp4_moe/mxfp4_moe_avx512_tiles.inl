// Tiles of the experts' layers by simd/panels_avx512x.inl, which is included before, as is swiglu.inl.

inline f32v bias_of(const MoeTile& t, int64_t n, int lanes) {
  return t.bias_f32 != nullptr ? load_n(t.bias_f32 + n, lanes) : load_n(t.bias_bf16 + n, lanes);
}

// Rows alternate between gate and up: the even lanes of two vectors, then the odd ones.
template <class F>
void moe_gate_up(const MoeTile& t) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  fetch_bias(t.bias_f32, t.bias_bf16, t.n_begin, t.n_end);
  for_each_tile<F>(t.x, t.rows, t.num_rows, t.weight, t.n_begin, t.n_end, t.k,
                   [&](int64_t m, int64_t tokens, int64_t n, int64_t width, const float* results) {
                     // Both matrices have whole panels: one or two.
                     const f32v bias0 = bias_of(t, n, kLanes);
                     const f32v bias1 = width > kLanes ? bias_of(t, n + kLanes, kLanes) : zero();
                     for (int64_t i = 0; i < tokens; ++i) {
                       const __m512 low = add(load(results + i * kTileRows), bias0).v;
                       const __m512 high = add(load(results + i * kTileRows + kLanes), bias1).v;
                       const f32v gate = {_mm512_permutex2var_ps(low, even, high)};
                       const f32v up = {_mm512_permutex2var_ps(low, odd, high)};
                       store_n(t.y + (m + i) * t.y_stride + n / 2, swiglu(gate, up, t.alpha, t.limit),
                               static_cast<int>(width / 2));
                     }
                   });
}

template <class F>
void moe_down(const MoeTile& t) {
  fetch_bias(t.bias_f32, t.bias_bf16, t.n_begin, t.n_end);
  for_each_tile<F>(t.x, t.rows, t.num_rows, t.weight, t.n_begin, t.n_end, t.k,
                   [&](int64_t m, int64_t tokens, int64_t n, int64_t width, const float* results) {
                     for (int64_t j = 0; j < width; j += kLanes) {
                       const f32v bias = bias_of(t, n + j, kLanes);
                       for (int64_t i = 0; i < tokens; ++i) {
                         store(t.y + (m + i) * t.y_stride + n + j, add(load(results + i * kTileRows + j), bias));
                       }
                     }
                   });
}
