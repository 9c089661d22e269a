// What every kernel of mxfp4_moe has, in the vector vocabulary. Included inside a kernel's namespace and target
// region.

#include "simd/math.inl"
#include "simd/prepare.inl"
#include "ops/mxfp4_moe/swiglu.inl"

inline float tile_bias(const MoeTile& t, int64_t n) {
  return t.bias_f32 != nullptr ? t.bias_f32[n] : to_float(t.bias_bf16[n]);
}

inline void combine_rows(const CombineRow& c) {
  for (int64_t i = 0; i < c.n; i += kLanes) {
    const int lanes = static_cast<int>(c.n - i < kLanes ? c.n - i : kLanes);
    f32v sum = zero();
    for (int64_t row = 0; row < c.num_rows; ++row) {
      if (c.rows[row] != nullptr) sum = fma(set1(c.weights[row]), load_n(c.rows[row] + i, lanes), sum);
    }
    if (c.residual != nullptr) sum = add(load_n(c.residual + i, lanes), sum);
    store_n(c.y + i, sum, lanes);
  }
}
