// Tiles of mxfp4_moe by panels, in the vector vocabulary. Included inside a kernel's namespace and target region.

#include "ops/mxfp4_moe/mxfp4_moe_rows.inl"
#include "simd/panels.inl"

// Rows alternate between gate and up, so a panel holds eight pairs.
template <class F>
inline void moe_gate_up_panels(const MoeTile& t) {
  constexpr int kPairs = kPanelRows / 2;
  for_each_panel<F>(t.x, t.rows, t.num_rows, t.weight, t.n_begin, t.n_end, t.k,
                    [&](int64_t m, int64_t tokens, int64_t n, int64_t width, const float* results) {
                      for (int64_t j = 0; j < width; j += kPanelRows) {
                        for (int64_t i = 0; i < tokens; ++i) {
                          const float* row = results + i * kTileRows<F> + j;
                          float gate[kPairs], up[kPairs];
                          for (int64_t c = 0; c < kPairs; ++c) {
                            gate[c] = row[2 * c] + tile_bias(t, n + j + 2 * c);
                            up[c] = row[2 * c + 1] + tile_bias(t, n + j + 2 * c + 1);
                          }
                          store_n(t.y + (m + i) * t.y_stride + (n + j) / 2,
                                  swiglu(load_n(gate, kPairs), load_n(up, kPairs), t.alpha, t.limit), kPairs);
                        }
                      }
                    });
}

template <class F>
inline void moe_down_panels(const MoeTile& t) {
  for_each_panel<F>(t.x, t.rows, t.num_rows, t.weight, t.n_begin, t.n_end, t.k,
                    [&](int64_t m, int64_t tokens, int64_t n, int64_t width, const float* results) {
                      for (int64_t i = 0; i < tokens; ++i) {
                        float* y = t.y + (m + i) * t.y_stride + n;
                        for (int64_t j = 0; j < width; ++j) {
                          y[j] = results[i * kTileRows<F> + j] + tile_bias(t, n + j);
                        }
                      }
                    });
}

template <class F>
constexpr MoeKernel by_panels(const PrepareFn& prepare, int value_bytes, int block_floats) {
  return {prepare, prepare, value_bytes, block_floats, moe_gate_up_panels<F>, moe_down_panels<F>};
}
