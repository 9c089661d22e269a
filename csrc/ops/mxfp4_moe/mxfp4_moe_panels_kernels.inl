// The tiles of mxfp4_moe by panels for every format of the activations. Included inside a kernel's namespace and
// target region.

#include "ops/mxfp4_moe/mxfp4_moe_panels.inl"
#include "simd/panels_bytes.inl"
#include "simd/panels_decoded.inl"
#include "simd/panels_floats.inl"
#include "simd/prepare_int16.inl"
#include "simd/panels_words.inl"

constexpr MoeKernels kMoeWithPanels = {by_panels<FloatsMxfp4>(kPrepareF32, 4, 0),
                                       by_panels<WordsMxfp4>(kPreparePanelI16<WordsMxfp4>, 2, kMetaFloats),
                                       by_panels<BytesMxfp4>(kPreparePanel<BytesMxfp4>, 1, kMetaFloats)};
