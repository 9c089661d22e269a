// Weights packed by panels of sixteen rows, so that kernels find the same few values of K of all sixteen side by
// side. A panel is a row of blocks of 32 values of K; the panels of a matrix follow each other.
//   MXFP4: 256 bytes a block, [K / 8][row] dwords of eight codes, from the lowest bit on k0 k2 k4 k6 k1 k3 k5 k7: the
//          low half of each dword holds the first values of four pairs, the high half the second ones. Scales: 16
//          e8m0 bytes a block, one a row.
//   int8:  512 bytes a block, [K / 4][row] dwords of four codes in order, raised by 128. Scales: 16 bfloat16 a block.
//   bf16:  1024 bytes a block, [K / 2][row] dwords of two values in order.
// Blocks may lie any number of bytes apart, and panels too. Fastest is a block, its scales, the next block: then
// memory is read as one stream.
#pragma once

#include "core/types.h"

namespace mxmoe {

constexpr int kPanelRows = 16;
constexpr int kPackedMxfp4Bytes = kPanelRows * kMxBlockBytes;
constexpr int kPackedInt8Bytes = kPanelRows * kMxBlock;
constexpr int kPackedBf16Bytes = 2 * kPackedInt8Bytes;

// Eight codes as stored (k0 lowest) to the packed order, and back.
inline uint32_t pack_codes(uint32_t x) {
  const auto gather = [](uint32_t nibbles) {  // the low nibbles of four bytes side by side
    nibbles &= 0x0f0f0f0fu;
    nibbles = (nibbles | nibbles >> 4) & 0x00ff00ffu;
    return (nibbles | nibbles >> 8) & 0xffffu;
  };
  return gather(x) | gather(x >> 4) << 16;
}
inline uint32_t unpack_codes(uint32_t y) {
  const auto spread = [](uint32_t nibbles) {
    nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu;
    return (nibbles | nibbles << 4) & 0x0f0f0f0fu;
  };
  return spread(y & 0xffffu) | spread(y >> 16) << 4;
}
inline uint32_t flip_signs(uint32_t codes) { return codes ^ 0x80808080u; }  // raises four int8 by 128, and back

// Row `row` of a panel: `dwords` dwords of one block into `out`, in stored order but for what `undo` takes off.
template <class Undo>
inline void unpack_row(const void* panel_block, int64_t row, int dwords, const Undo& undo, void* out) {
  const auto* from = static_cast<const unsigned char*>(panel_block) + row * 4;
  auto* to = static_cast<unsigned char*>(out);
  for (int i = 0; i < dwords; ++i) {
    uint32_t x;
    std::memcpy(&x, from + i * 4 * kPanelRows, sizeof x);
    x = undo(x);
    std::memcpy(to + i * 4, &x, sizeof x);
  }
}

}  // namespace mxmoe
