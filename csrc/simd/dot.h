// What the dot-product kernels of linear and mxfp4_moe take: prepared activation rows and weight rows as
// stored.
#pragma once

#include "core/packed.h"
#include "core/types.h"

namespace mxmoe {

// Prepared rows are zero-padded to a multiple of this many values, so that kernels load whole vectors.
constexpr int64_t kPadK = 64;
inline int64_t padded_k(int64_t k) { return (k + kPadK - 1) / kPadK * kPadK; }

// Activation rows after rounding. float32: values only. bf16: values are bf16 where the kernel has bf16 dot
// products, 16-bit codes where it has integers instead, else float32 holding bf16 values. Codes, and int8's, have per
// block of 32 a float32 scale and whatever else the kernel wants beside it.
struct PreparedRows {
  void* values;
  float* scales;
  int64_t value_stride;  // bytes from row to row
  int64_t block_stride;  // floats from row to row, of scales
  int64_t second;        // bytes from a row's values to their second form, of as many bytes, where there is one
};

// What integer activations of a block have beside their codes, where weights are multiplied by panels.
struct BlockMeta {
  float scale;
  int32_t start;  // -raise * sum of the codes: takes the raise of the weights off again
};
constexpr int kMetaFloats = sizeof(BlockMeta) / sizeof(float);

// Weight rows (num_rows, k), as stored with k innermost or packed. bf16: values. int8: values and bf16 scales per
// block of 32. MXFP4: 16-byte blocks and e8m0 scales.
struct WeightRows {
  const void* values;
  const void* scales;
  int64_t value_stride;  // bytes from row to row; packed: from panel to panel
  int64_t scale_stride;
  bool packed;                       // by panels of sixteen rows, see core/packed.h
  int64_t value_block, scale_block;  // packed: bytes from block to block
};

// How one row is prepared, from either dtype of x.
struct PrepareFn {
  void (*f32)(const float* x, int64_t k, const PreparedRows& to, int64_t row);
  void (*b16)(const bf16* x, int64_t k, const PreparedRows& to, int64_t row);
};

}  // namespace mxmoe
