#if defined(MXMOE_X86_KERNELS)
#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avx512vnni.h"

#include "core/target_avx512vnni.h"
namespace mxmoe {
namespace avx512vnni {
namespace {
#include "simd/math.inl"
#include "simd/prepare.inl"
#include "simd/panels_avx512x.inl"
#include "simd/panels_avx512vnni_int8.inl"
#include "simd/prepare_int16.inl"
#include "simd/panels_avx512vnni_int16.inl"
#include "ops/mxfp4_moe/swiglu.inl"
#include "ops/mxfp4_moe/mxfp4_moe_avx512_tiles.inl"

template <CodeOrder kOrder>
constexpr PrepareFn kI8 = {prepare_panel_i8<PanelI8Mxfp4::kRaise, kOrder, float>,
                           prepare_panel_i8<PanelI8Mxfp4::kRaise, kOrder, bf16>};
}  // namespace
}  // namespace avx512vnni

const MoeKernel mxfp4_moe_int8_avx512vnni = {avx512vnni::kI8<avx512vnni::CodeOrder::kStored>,
                                             avx512vnni::kI8<avx512vnni::CodeOrder::kPacked>,
                                             1,
                                             kMetaFloats,
                                             avx512vnni::moe_gate_up<avx512vnni::PanelI8Mxfp4>,
                                             avx512vnni::moe_down<avx512vnni::PanelI8Mxfp4>};
const MoeKernel mxfp4_moe_bf16_avx512vnni = {avx512vnni::kPrepareSplitI16<avx512vnni::PanelI16Mxfp4>,
                                             avx512vnni::kPrepareSplitI16<avx512vnni::PanelI16Mxfp4>,
                                             2,
                                             kMetaFloats,
                                             avx512vnni::moe_gate_up<avx512vnni::PanelI16Mxfp4>,
                                             avx512vnni::moe_down<avx512vnni::PanelI16Mxfp4>,
                                             2};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
