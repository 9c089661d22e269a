#include "core/isa.h"
#if defined(MXMOE_AVX_VNNI_KERNELS)
#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avxvnni.h"

#include "core/target_avxvnni.h"
namespace mxmoe {
namespace avxvnni {
namespace {
#include "ops/mxfp4_moe/mxfp4_moe_panels.inl"
#include "simd/panels_bytes.inl"
#include "simd/panels_dot.inl"
#include "simd/panels_decoded.inl"
#include "simd/prepare_int16.inl"
#include "simd/panels_words.inl"
}  // namespace
}  // namespace avxvnni

const MoeKernel mxfp4_moe_int8_avxvnni =
    avxvnni::by_panels<avxvnni::DotMxfp4>(avxvnni::kPreparePanel<avxvnni::DotMxfp4>, 1, kMetaFloats);
const MoeKernel mxfp4_moe_bf16_avxvnni =
    avxvnni::by_panels<avxvnni::WordsMxfp4>(avxvnni::kPreparePanelI16<avxvnni::WordsMxfp4>, 2, kMetaFloats);

}  // namespace mxmoe
#include "core/target_end.h"
#elif defined(MXMOE_X86_KERNELS)
#include "ops/mxfp4_moe/mxfp4_moe.h"

const mxmoe::MoeKernel mxmoe::mxfp4_moe_int8_avxvnni = {}, mxmoe::mxfp4_moe_bf16_avxvnni = {};
#endif  // MXMOE_AVX_VNNI_KERNELS
