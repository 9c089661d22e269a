// Tiles of mxfp4_moe, row by row: portable code, in the vector vocabulary. Included inside its namespace.

#include "simd/dot_formats.inl"
#include "simd/dot_tile.inl"
#include "ops/mxfp4_moe/mxfp4_moe_rows.inl"

template <class F>
void moe_gate_up(const MoeTile& t) {
  constexpr int kRows = 16,
                kPairs = 32;  // activation rows x output columns of one pass; the buffers live on the stack
  float gate[kRows][kPairs], up[kRows][kPairs];
  for (int64_t m = 0; m < t.num_rows; m += kRows) {
    const int64_t count = t.num_rows - m < kRows ? t.num_rows - m : kRows;
    for (int64_t n = t.n_begin; n < t.n_end; n += 2 * kPairs) {
      const int64_t end = n + 2 * kPairs < t.n_end ? n + 2 * kPairs : t.n_end;
      for_each_dot<F, 8, 2>(t.x, t.rows + m, count, t.weight, n, end, t.k, [&](int64_t i, int64_t row, float value) {
        value += tile_bias(t, row);
        // By a pointer: GCC's bounds sanitizer copies an array chosen by ?: and writes the copy.
        float (*half)[kPairs] = (row & 1) != 0 ? up : gate;
        half[i][(row - n) / 2] = value;
      });
      const int pairs = static_cast<int>((end - n) / 2);
      for (int64_t i = 0; i < count; ++i) {
        float* y = t.y + (m + i) * t.y_stride + n / 2;
        for (int c = 0; c < pairs; c += kLanes) {
          const int lanes = pairs - c < kLanes ? pairs - c : kLanes;
          store_n(y + c, swiglu(load_n(gate[i] + c, lanes), load_n(up[i] + c, lanes), t.alpha, t.limit), lanes);
        }
      }
    }
  }
}

template <class F>
void moe_down(const MoeTile& t) {
  for_each_dot<F, 8, 2>(
      t.x, t.rows, t.num_rows, t.weight, t.n_begin, t.n_end, t.k,
      [&](int64_t i, int64_t row, float value) { t.y[i * t.y_stride + row] = value + tile_bias(t, row); });
}

constexpr PrepareFn kPrepareI8 = {prepare_i8<float>, prepare_i8<bf16>};
constexpr MoeKernel kMoeF32 = {kPrepareF32, kPrepareF32, 4, 0, moe_gate_up<DotF32Mxfp4>, moe_down<DotF32Mxfp4>};
// Without bf16 dot products the values are bf16 held in float32.
constexpr MoeKernel kMoeBf16 = {kPrepareBf16, kPrepareBf16, 4, 0, moe_gate_up<DotF32Mxfp4>, moe_down<DotF32Mxfp4>};
constexpr MoeKernel kMoeI8 = {kPrepareI8, kPrepareI8, 1, 1, moe_gate_up<DotI8Mxfp4>, moe_down<DotI8Mxfp4>};
