// The tiles of mxfp4_moe by panels for every format of the activations. Included inside a kernel's namespace and
// target region.

#include "ops/mxfp4_moe/mxfp4_moe_panels.inl"
#include "simd/panels_bytes.inl"
#include "simd/panels_floats.inl"

// Without bf16 dot products the values are bf16 held in float32.
constexpr MoeKernels kMoeWithPanels = {by_panels<FloatsMxfp4>(kPrepareF32, 4, 0),
                                       by_panels<FloatsMxfp4>(kPrepareBf16, 4, 0),
                                       by_panels<BytesMxfp4>(kPreparePanel<BytesMxfp4>, 1, kMetaFloats)};
