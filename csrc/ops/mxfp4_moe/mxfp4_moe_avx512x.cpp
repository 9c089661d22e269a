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
#include "simd/panels_avx512x_bf16.inl"
#include "ops/mxfp4_moe/swiglu.inl"
#include "ops/mxfp4_moe/mxfp4_moe_avx512_tiles.inl"

constexpr PrepareFn kBf16 = {prepare_panel_bf16<float>, prepare_panel_bf16<bf16>};
constexpr int kRangeFloats = 1;  // a block, of which a row has one more: room for its range
}  // namespace
}  // namespace avx512x

const MoeKernel mxfp4_moe_bf16_avx512x = {avx512x::kBf16,
                                          avx512x::kBf16,
                                          2,
                                          avx512x::kRangeFloats,
                                          avx512x::moe_gate_up<avx512x::PanelBf16Mxfp4>,
                                          avx512x::moe_down<avx512x::PanelBf16Mxfp4>};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
