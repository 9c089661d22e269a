#if defined(MXMOE_X86_KERNELS)
#include "ops/linear/linear.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avx512x.h"

#include "core/target_avx512x.h"
namespace mxmoe {
namespace avx512x {
namespace {
#include "simd/prepare.inl"
#include "simd/panels_avx512x.inl"
#include "simd/panels_avx512x_bf16.inl"
#include "ops/linear/linear_avx512_tile.inl"

constexpr PrepareFn kBf16 = {prepare_bf16<float>, prepare_bf16<bf16>};
}  // namespace
}  // namespace avx512x

const LinearKernel linear_bf16_bf16_avx512x = {avx512x::kBf16, 2, 0, avx512x::kTileRows,
                                               avx512x::linear_tile<avx512x::PanelBf16Bf16>};
const LinearKernel linear_bf16_int8_avx512x = {avx512x::kBf16, 2, 0, avx512x::kTileRows,
                                               avx512x::linear_tile<avx512x::PanelBf16I8>};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
