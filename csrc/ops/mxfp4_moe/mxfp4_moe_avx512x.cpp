#if defined(MXMOE_X86_KERNELS)
#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avx512x.h"

#include "core/target_avx512x.h"
namespace mxmoe {
namespace avx512x {
namespace {
#include "simd/math.inl"
#include "simd/prepare.inl"
#include "simd/panels_avx512x.inl"
#include "ops/mxfp4_moe/swiglu.inl"

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

constexpr PrepareFn kBf16 = {prepare_panel_bf16<float>, prepare_panel_bf16<bf16>};
template <CodeOrder kOrder>
constexpr PrepareFn kI8 = {prepare_panel_i8<12, kOrder, float>, prepare_panel_i8<12, kOrder, bf16>};
constexpr int kMetaFloats = sizeof(BlockMeta) / sizeof(float);
constexpr int kRangeFloats = 1;  // a block, of which a row has one more: room for its range
}  // namespace
}  // namespace avx512x

const MoeKernel mxfp4_moe_bf16_avx512x = {avx512x::kBf16,
                                          avx512x::kBf16,
                                          2,
                                          avx512x::kRangeFloats,
                                          avx512x::moe_gate_up<avx512x::PanelBf16Mxfp4>,
                                          avx512x::moe_down<avx512x::PanelBf16Mxfp4>};
const MoeKernel mxfp4_moe_int8_avx512x = {
    avx512x::kI8<avx512x::CodeOrder::kStored>,   avx512x::kI8<avx512x::CodeOrder::kPacked>, 1, avx512x::kMetaFloats,
    avx512x::moe_gate_up<avx512x::PanelI8Mxfp4>, avx512x::moe_down<avx512x::PanelI8Mxfp4>};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
