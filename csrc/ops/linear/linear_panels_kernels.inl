// The tiles of linear by panels for every pair of formats. Included inside a kernel's namespace and target region.

#include "ops/linear/linear_panels.inl"
#include "simd/panels_bytes.inl"
#include "simd/panels_decoded.inl"
#include "simd/panels_floats.inl"
#include "simd/prepare_int16.inl"
#include "simd/panels_words.inl"

// With bfloat16 weights the activations are bfloat16 held in float32.
constexpr LinearKernels kLinearWithPanels = {
    {kPrepareF32, 4, 0, kPanelRows, linear_panels<FloatsBf16>},
    {kPrepareBf16, 4, 0, kPanelRows, linear_panels<FloatsBf16>},
    {kPrepareF32, 4, 0, kPanelRows, linear_panels<FloatsI8>},
    {kPreparePanelI16<WordsI8>, 2, kMetaFloats, kPanelRows, linear_panels<WordsI8>},
    {kPreparePanel<BytesI8>, BytesI8::kTokenBytes / kMxBlock, kMetaFloats, kPanelRows, linear_panels<BytesI8>}};
