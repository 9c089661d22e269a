#if defined(MXMOE_X86_KERNELS)
#include "ops/linear/linear.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avx512vnni.h"

#include "core/target_avx512vnni.h"
namespace mxmoe {
namespace avx512vnni {
namespace {
#include "simd/prepare.inl"
#include "simd/panels_avx512x.inl"
#include "simd/panels_avx512vnni_int8.inl"
#include "simd/prepare_int16.inl"
#include "simd/panels_avx512vnni_int16.inl"
#include "ops/linear/linear_avx512_tile.inl"

constexpr PrepareFn kI8 = {prepare_panel_i8<128, CodeOrder::kPlain, float>,
                           prepare_panel_i8<128, CodeOrder::kPlain, bf16>};
}  // namespace
}  // namespace avx512vnni

const LinearKernel linear_int8_int8_avx512vnni = {avx512vnni::kI8, 1, kMetaFloats, avx512vnni::kTileRows,
                                                  avx512vnni::linear_tile<avx512vnni::PanelI8I8>};
const LinearKernel linear_bf16_int8_avx512vnni = {
    avx512vnni::kPrepareSplitI16<avx512vnni::PanelI16I8>, 2, kMetaFloats, avx512vnni::kTileRows,
    avx512vnni::linear_tile<avx512vnni::PanelI16I8>,      2};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
