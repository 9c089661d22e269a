// What both kernels for Hopper share. A warpgroup multiplies 64 weight rows, which it decodes straight into the
// registers of wgmma's left operand, by pairs whose activations lie in shared memory as the right one.
//
// A step is four blocks of K, 128 values: lane (g, t) of a warp holds block t of rows g and g + 8, one access of 16
// bytes and one scale each. Which value of K stands where is free as long as both operands agree, so activations are
// laid out the way codes come out of a word of eight: value 32 t + 8 w + r + 4 e of a step stands at
// 8 (4 w + r) + 2 t + e. K is filled up with zeros to whole steps.
//
// The scale is folded into the codes. The bits of an e2m1, sign at bit 15 and the rest at bits 8 to 6, are the
// bfloat16 of its value times 2^-126, subnormal 0.5 included; one multiplication by 2^(scale byte - 1) makes the
// weight. The factor is a bfloat16 for bytes up to 128, and no weight is smaller than bfloat16's normal numbers for
// bytes from 2. Slices of six steps are summed from zero, then added in order: the bits are the same for any number
// of pairs.
#pragma once

#include "ops/mxfp4_moe/mxfp4_moe_fragments.cuh"

namespace mxmoe {
namespace cuda {
namespace moe {

constexpr int kSmallestFoldedScale = 2, kLargestFoldedScale = 128;

constexpr int kStep = 128, kStepBlocks = kStep / kMxBlock;
constexpr int kSliceSteps = 6;
constexpr int kGroupRows = 64;  // weight rows of a warpgroup
constexpr int kGroupThreadsWgmma = 4 * kWarp;
constexpr int kRowBytes = 128, kPattern = 8 * kRowBytes;  // of the 128-byte swizzle: 64 values to a row

__host__ __device__ constexpr int64_t padded(int64_t k) { return (k + kStep - 1) / kStep * kStep; }

// Where a value of a row of activations stands.
__device__ __forceinline__ int64_t place_of(int64_t value) {
  const int in_step = static_cast<int>(value % kStep);
  const int t = in_step / 32, w = in_step / 8 % 4, e = in_step / 4 % 2, r = in_step % 4;
  return value - in_step + 8 * (4 * w + r) + 2 * t + e;
}

// Eight neighbours' places are four pairs of values, in the four pieces of 16 bytes from here on.
__device__ __forceinline__ int64_t first_place_of(int64_t values_by_8) { return place_of(8 * values_by_8); }

// Eight neighbours v as the pairs (v[r], v[r + 4]).
__device__ __forceinline__ uint4 interleave(uint4 v) {
  return make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410),
                    __byte_perm(v.y, v.w, 0x7632));
}

// Where piece c (of 16 bytes) of pair n's row stands in a tile of kPairs pairs, step after step.
template <int kPairs>
__device__ __forceinline__ int piece_offset(int n, int c) {
  return c / 8 * (kPairs * kRowBytes) + n * kRowBytes + ((c % 8) ^ (n % 8)) * 16;
}

// The thread's block of a step, of its two rows.
struct WeightLane {
  const uint8_t *codes, *scales;  // of the first row's first block
  int high, left;                 // blocks to the other row, and to the end of K
};

// For the 16 rows from `row` on. A warp whose rows are missing reads the last ones: nobody uses its sums.
__device__ __forceinline__ WeightLane weight_lane(const Product& p, int expert, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t at = (int64_t{expert} * p.rows + min(row, p.rows - 16) + lane / 4) * p.k_blocks + lane % 4;
  return {p.blocks + at * kMxBlockBytes, p.scales + at, 8 * p.k_blocks, p.k_blocks - lane % 4};
}

struct StepCodes {
  uint4 codes[2];
  uint32_t scales[2];
};

// Blocks past the end of K count as zeros.
__device__ __forceinline__ StepCodes load_step(const WeightLane& w, int step) {
  StepCodes s;
  const int block = step * kStepBlocks;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    s.codes[i] = make_uint4(0, 0, 0, 0), s.scales[i] = kSmallestFoldedScale;
    if (block < w.left) {
      s.codes[i] = ptx::load_once_16(w.codes + int64_t{block + i * w.high} * kMxBlockBytes);
      s.scales[i] = w.scales[block + i * w.high];
    }
  }
  return s;
}

// 2^(scale byte - 1) twice.
__device__ __forceinline__ uint32_t factor_of(uint32_t scale) { return (scale + 126u) * 0x00800080u; }

// Eight codes to four pairs of bfloat16: pair r is codes r and r + 4.
__device__ __forceinline__ void decode_folded(uint32_t codes, uint32_t factor, uint32_t (&pairs)[4]) {
  // Twice each code, at bits 9 to 6 and 15 to 12; of which its sign and its other bits are wanted.
  const uint32_t upper = codes >> 8;
  const uint32_t spread[4] = {(codes & 0x000f000fu) * 0x1040u, (codes & 0x00f000f0u) * 0x0104u,
                              (upper & 0x000f000fu) * 0x1040u, (upper & 0x00f000f0u) * 0x0104u};
#pragma unroll
  for (int r = 0; r < 4; ++r) pairs[r] = ptx::mul_bf16x2(spread[r] & 0x81c081c0u, factor);
}

__device__ __forceinline__ uint32_t word_of(uint4 v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Word w of a step's codes to the left operands of two products, 16 values of K each.
__device__ __forceinline__ void decode_word(const StepCodes& s, const uint32_t (&factors)[2], int w,
                                            uint32_t (&a)[2][4]) {
  uint32_t low[4], high[4];
  decode_folded(word_of(s.codes[0], w), factors[0], low);
  decode_folded(word_of(s.codes[1], w), factors[1], high);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i][0] = low[2 * i], a[i][1] = high[2 * i], a[i][2] = low[2 * i + 1], a[i][3] = high[2 * i + 1];
  }
}

// The right operand of product i, 0 to 7, of a step.
template <int kPairs>
__device__ __forceinline__ uint64_t right_operand(const unsigned char* step, int i) {
  return ptx::matrix_descriptor(step + i / 4 * (kPairs * kRowBytes) + i % 4 * 32, kPattern);
}

// The second product's activations of outputs past the last are zeros, up to a whole step.
__device__ __forceinline__ void write_padding(const Product& p, int64_t pair, int output) {
  static_cast<bf16*>(p.y)[pair * padded(p.rows / 2) + place_of(output)] = bf16{0};
}

// Rows of activations, rounded, in the order of places. grid: (token, eights of values).
template <typename X>
__global__ void __launch_bounds__(kRoundThreads)
    mxfp4_moe_arrange_sm90_kernel(const X* x, int64_t x_stride, int k, uint32_t* y) {
  const int64_t token = blockIdx.x;
  const int eight = static_cast<int>(blockIdx.y) * kRoundThreads + static_cast<int>(threadIdx.x);
  const int64_t k_padded = padded(k);
  if (8 * eight >= k_padded) return;
  const bool aligned = linear_mma::rows_aligned(x, x_stride);
  ptx::wait_for_previous_kernel();
  ptx::release_next_kernel();
  const uint4 v = interleave(linear_mma::load8(x + token * x_stride, 8 * eight, k, aligned));
  uint32_t* to = y + (token * k_padded + first_place_of(eight)) / 2;
#pragma unroll
  for (int r = 0; r < 4; ++r) to[4 * r] = word_of(v, r);
}

}  // namespace moe
}  // namespace cuda
}  // namespace mxmoe
