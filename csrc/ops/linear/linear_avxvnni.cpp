#include "core/isa.h"
#if defined(MXMOE_AVX_VNNI_KERNELS)
#include "ops/linear/linear.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avxvnni.h"

#include "core/target_avxvnni.h"
namespace mxmoe {
namespace avxvnni {
namespace {
#include "ops/linear/linear_panels.inl"
#include "simd/panels_bytes.inl"
#include "simd/panels_dot.inl"
#include "simd/panels_decoded.inl"
#include "simd/prepare_int16.inl"
#include "simd/panels_words.inl"
}  // namespace
}  // namespace avxvnni

const LinearKernel linear_int8_int8_avxvnni = {avxvnni::kPreparePanel<avxvnni::DotI8>, 1, kMetaFloats, kPanelRows,
                                               avxvnni::linear_panels<avxvnni::DotI8>};

const LinearKernel linear_bf16_int8_avxvnni = {avxvnni::kPreparePanelI16<avxvnni::WordsI8>, 2, kMetaFloats,
                                               kPanelRows, avxvnni::linear_panels<avxvnni::WordsI8>};

}  // namespace mxmoe
#include "core/target_end.h"
#elif defined(MXMOE_X86_KERNELS)
#include "ops/linear/linear.h"

const mxmoe::LinearKernel mxmoe::linear_int8_int8_avxvnni = {}, mxmoe::linear_bf16_int8_avxvnni = {};
#endif  // MXMOE_AVX_VNNI_KERNELS
