// quantize
// Computes: mxfp4_dequantize: value = e2m1[code] * 2^(scale - 127). mxfp4_quantize: per block of 32,
//           scale = 2^(floor(log2(amax)) - 2), codes to nearest, ties to the even code, saturating at 6; a block of
//           zeros gets scale byte 0. int8_quantize: per block of 32, scale = amax / 127 rounded up to bfloat16,
//           code = round(x / scale), ties to even. first_not_finite: the place of the first NaN or infinity, or -1.
// Shapes:   values (rows, k); blocks (rows, k / 32, 16); scales (rows, k / 32); codes (rows, k). first_not_finite: x
//           (n), bfloat16.
// Dtypes:   values float32 or bfloat16 (the dequantised ones too); blocks, MXFP4 scales uint8; codes int8, their
//           scales bfloat16. Dequantising is exact but for bfloat16's and float32's range.
// Layout:   contiguous; the values to quantise may have a row stride. Low nibble first.
// Requires: k a multiple of 32; values to quantise finite (checked before anything is written).
// Calls:    no overlap; rows are spread over threads; no scratch.
// Source:   OCP Microscaling v1.0, sections 5.3 and 6.3; Dettmers et al. 2022, section 2.
#pragma once

#include "core/types.h"

namespace mxmoe {

int64_t first_not_finite(const Tensor& x);
void mxfp4_dequantize(const Tensor& blocks, const Tensor& scales, const Tensor& values);
void mxfp4_quantize(const Tensor& values, const Tensor& blocks, const Tensor& scales);
void int8_quantize(const Tensor& values, const Tensor& codes, const Tensor& scales);

}  // namespace mxmoe
