// A tile of a dense layer by simd/panels_avx512x.inl, which is included before.

template <class F>
void linear_tile(const LinearTile& t) {
  const int64_t count = t.m_end - t.m_begin;
  fetch_bias(t.bias_f32, t.bias_bf16, t.n_begin, t.n_end);
  PreparedRows x = t.x;
  x.values = static_cast<char*>(x.values) + t.m_begin * x.value_stride;
  x.scales += t.m_begin * x.block_stride;
  for_each_tile<F>(x, nullptr, count, t.weight, t.n_begin, t.n_end, t.in_features,
                   [&](int64_t m, int64_t tokens, int64_t n, int64_t width, const float* results) {
                     for (int64_t j = 0; j < width; j += kLanes) {
                       const int lanes = static_cast<int>(width - j < kLanes ? width - j : kLanes);
                       f32v bias = zero();
                       if (t.bias_f32 != nullptr) bias = load_n(t.bias_f32 + n + j, lanes);
                       if (t.bias_bf16 != nullptr) bias = load_n(t.bias_bf16 + n + j, lanes);
                       for (int64_t i = 0; i < tokens; ++i) {
                         const int64_t row = t.m_begin + m + i;
                         f32v y = add(load(results + i * kTileRows + j), bias);
                         if (t.residual != nullptr) {
                           y = add(y, load_n(t.residual + row * t.residual_stride + n + j, lanes));
                         }
                         store_n(t.y + row * t.y_stride + n + j, y, lanes);
                       }
                     }
                   });
}
