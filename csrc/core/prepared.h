// Scratch for activation rows rounded to what a dot-product kernel takes; shared by linear and mxfp4_moe.
#pragma once

#include "core/scratch.h"
#include "simd/dot.h"

namespace mxmoe {

// Of a LinearKernel or a MoeKernel.
template <class Kernel>
size_t prepared_bytes(int64_t rows, int64_t k, const Kernel& kernel) {
  const int64_t value_bytes = kernel.value_bytes + kernel.second_bytes;
  size_t bytes = Scratch::bytes<char>(checked_product("activations", {rows, padded_k(k), value_bytes}));
  bytes += Scratch::bytes<float>(checked_product("activation scales", {rows, k / kMxBlock + 1, kernel.block_floats}));
  return bytes;
}

template <class Kernel>
PreparedRows take_prepared(Scratch& scratch, int64_t rows, int64_t k, const Kernel& kernel) {
  PreparedRows p{};
  p.value_stride = padded_k(k) * kernel.value_bytes;
  p.second = rows * p.value_stride;
  p.values = scratch.take<char>(static_cast<size_t>(rows * padded_k(k) * (kernel.value_bytes + kernel.second_bytes)));
  p.block_stride = (k / kMxBlock + 1) * kernel.block_floats;  // one more for what concerns the whole row
  p.scales = scratch.take<float>(static_cast<size_t>(rows * p.block_stride));
  return p;
}

}  // namespace mxmoe
