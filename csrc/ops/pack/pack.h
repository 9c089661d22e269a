// pack, unpack
// Computes: weights as stored to the panels of core/packed.h, and back.
// Shapes:   MXFP4: blocks (rows, K / 32, 16) and scales (rows, K / 32) <-> packed (rows / 16, K / 32, 256) and
//           (rows / 16, K / 32, 16). Dense: weight (rows, K), int8 with scales (rows, K / 32) <-> packed (rows / 16,
//           K / 32, 512) with scales (rows / 16, K / 32, 16).
// Dtypes:   MXFP4 uint8 throughout. Dense: bfloat16 <-> bfloat16; int8 <-> uint8 (raised by 128), scales bfloat16.
//           Nothing is rounded.
// Layout:   stored contiguous; packed with any strides but for the last axis: scales may lie beside their blocks.
// Requires: rows a multiple of 16, K of 32.
// Calls:    no overlap; panels are spread over threads; no scratch.
// Source:   core/packed.h.
#pragma once

#include "core/types.h"

namespace mxmoe {

enum class PackedForm { bf16, i8, mxfp4 };
// Whether the kernels in force want such weights packed for these activations; the others take them, but slowly.
bool prefers_packed(Activations activations, PackedForm weights);

void pack_mxfp4(const Tensor& blocks, const Tensor& scales, const Tensor& packed, const Tensor& packed_scales);
void unpack_mxfp4(const Tensor& packed, const Tensor& packed_scales, const Tensor& blocks, const Tensor& scales);
void pack_linear(const Tensor& weight, const Tensor& scales, const Tensor& packed, const Tensor& packed_scales);
void unpack_linear(const Tensor& packed, const Tensor& packed_scales, const Tensor& weight, const Tensor& scales);

}  // namespace mxmoe
