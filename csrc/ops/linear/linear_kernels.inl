// Tiles of linear for every pair of formats, row by row: portable code. Included inside its namespace and target
// region.

#include "simd/dot_formats.inl"
#include "simd/dot_tile.inl"
#include "simd/prepare.inl"

constexpr int kRowStep = 4;

template <class F>
void linear_tile(const LinearTile& t) {
  constexpr int kChunk = 64;
  for (int64_t m = t.m_begin; m < t.m_end; m += kChunk) {
    const int64_t count = t.m_end - m < kChunk ? t.m_end - m : kChunk;
    int64_t rows[kChunk];
    for (int64_t i = 0; i < count; ++i) rows[i] = m + i;
    for_each_dot<F, 4, kRowStep>(t.x, rows, count, t.weight, t.n_begin, t.n_end, t.in_features,
                                 [&](int64_t i, int64_t n, float value) {
                                   if (t.bias_f32 != nullptr) value += t.bias_f32[n];
                                   if (t.bias_bf16 != nullptr) value += to_float(t.bias_bf16[n]);
                                   if (t.residual != nullptr) value += t.residual[(m + i) * t.residual_stride + n];
                                   t.y[(m + i) * t.y_stride + n] = value;
                                 });
  }
}

constexpr PrepareFn kPrepareI8 = {prepare_i8<float>, prepare_i8<bf16>};

// Without bf16 dot products the values are bf16 held in float32.
constexpr LinearKernels kLinear = {{kPrepareF32, 4, 0, kRowStep, linear_tile<DotF32Bf16>},
                                   {kPrepareBf16, 4, 0, kRowStep, linear_tile<DotF32Bf16>},
                                   {kPrepareF32, 4, 0, kRowStep, linear_tile<DotF32I8>},
                                   {kPrepareBf16, 4, 0, kRowStep, linear_tile<DotF32I8>},
                                   {kPrepareI8, 1, 1, kRowStep, linear_tile<DotI8I8>}};
