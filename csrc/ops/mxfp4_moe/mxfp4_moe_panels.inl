// int8 x MXFP4 by panels, in the vector vocabulary. Included after mxfp4_moe_kernels.inl.

#include "simd/panels_bytes.inl"

// Rows alternate between gate and up, so a panel holds eight pairs.
inline void moe_gate_up_panels(const MoeTile& t) {
  constexpr int kPairs = kPanelRows / 2;
  for_each_panel<BytesMxfp4>(t.x, t.rows, t.num_rows, t.weight, t.n_begin, t.n_end, t.k,
                             [&](int64_t m, int64_t tokens, int64_t n, int64_t, const float* results) {
                               for (int64_t i = 0; i < tokens; ++i) {
                                 float gate[kPairs], up[kPairs];
                                 for (int64_t c = 0; c < kPairs; ++c) {
                                   gate[c] = results[i * kPanelRows + 2 * c] + tile_bias(t, n + 2 * c);
                                   up[c] = results[i * kPanelRows + 2 * c + 1] + tile_bias(t, n + 2 * c + 1);
                                 }
                                 store_n(t.y + (m + i) * t.y_stride + n / 2,
                                         swiglu(load_n(gate, kPairs), load_n(up, kPairs), t.alpha, t.limit), kPairs);
                               }
                             });
}

inline void moe_down_panels(const MoeTile& t) {
  for_each_panel<BytesMxfp4>(t.x, t.rows, t.num_rows, t.weight, t.n_begin, t.n_end, t.k,
                             [&](int64_t m, int64_t tokens, int64_t n, int64_t width, const float* results) {
                               for (int64_t i = 0; i < tokens; ++i) {
                                 float* y = t.y + (m + i) * t.y_stride + n;
                                 for (int64_t j = 0; j < width; ++j) {
                                   y[j] = results[i * kPanelRows + j] + tile_bias(t, n + j);
                                 }
                               }
                             });
}

constexpr MoeKernel kMoeI8Panels = {
    kPreparePanel<BytesMxfp4>, kPreparePanel<BytesMxfp4>, 1, kMetaFloats, moe_gate_up_panels, moe_down_panels};
