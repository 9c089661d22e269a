// The experts' two products, by tiles of (16 weight rows x pairs of one expert). MXFP4 is decoded in registers: codes
// to bfloat16, exactly, and a block's scale multiplies its sum, so that no scale byte can overflow or vanish. A block
// is one step of K, two instructions; lane (g, t) takes values 8t .. of rows g and g + 8 as in linear_mma.cuh. Slices
// of K are summed from zero, then added in order: the bits are the same for any number of pairs in a tile.
#pragma once

#include "ops/linear/linear_mma.cuh"
#include "ops/mxfp4_moe/mxfp4_moe_group.cuh"

namespace mxmoe {
namespace cuda {
namespace moe {

using linear_mma::kTileRows;
using linear_mma::kTileTokens;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSliceBlocks = 12;  // 384 values of K
constexpr int kSlices = 8;        // whose sums shared memory holds at a time
constexpr int kTile = kTileRows * kTileTokens;

struct Product {
  const uint8_t* blocks;  // (experts, rows, K / 32, 16)
  const uint8_t* scales;
  const float* bias_f32;
  const bf16* bias_bf16;
  int rows, k_blocks;
  const void* x;
  int64_t x_stride;
  int pairs_per_row;  // of x: experts_per_token where x is by token, 1 where it is by pair
  void* y;            // by pair: activations of rows / 2 values, or float32 of rows
  float alpha, limit;
  Groups groups;
  Combine combine;  // of few pairs, after the second product
};

// Eight codes to eight bfloat16, by tables of the values' upper and lower bytes: 0, .5, 1, 1.5, 2, 3, 4, 6.
__device__ __forceinline__ uint4 decode8(uint32_t codes) {
  uint32_t words[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t c = codes >> (16 * half);
    const uint32_t upper = __byte_perm(0x3f3f3f00u, 0x40404040u, c), lower = __byte_perm(0xc0800000u, 0xc0804000u, c);
    words[2 * half] = __byte_perm(lower, upper, 0x5140) | (c & 0x8u) << 12 | (c & 0x80u) << 24;
    words[2 * half + 1] = __byte_perm(lower, upper, 0x7362) | (c & 0x800u) << 4 | (c & 0x8000u) << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ float scale_of(uint8_t byte) {
  return __uint_as_float(byte == 0 ? 0x00400000u : static_cast<uint32_t>(byte) << 23);
}

__device__ __forceinline__ float bias_of(const Product& p, int64_t row) {
  return p.bias_f32 != nullptr ? p.bias_f32[row] : widen(p.bias_bf16[row]);
}

__device__ __forceinline__ float swiglu(float gate, float up, float alpha, float limit) {
  // Comparisons, not fminf: a NaN stays one.
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate / (1.0f + expf(-alpha * gate)) * (up + 1.0f);
}

// The row of x that a pair reads.
template <typename X>
__device__ __forceinline__ const X* row_of(const Product& p, int pair) {
  return static_cast<const X*>(p.x) + int64_t{pair / p.pairs_per_row} * p.x_stride;
}

// Shared memory ends with the block's list of pairs and a flag.
constexpr size_t kListBytes = (kFewPairs + 1) * sizeof(int32_t);
template <int kTiles>
constexpr size_t shared_bytes() {
  return sizeof(float) * kSlices * kTiles * kTile + kListBytes;
}

// Sums of one slice for 16 rows and the tile's pairs.
template <int kTiles, typename X>
__device__ __forceinline__ void multiply_slice(const Product& p, int64_t row, const X* const (&x)[kTiles],
                                               bool x_aligned, int begin, float (&acc)[kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int end = min(begin + kSliceBlocks, p.k_blocks);
  const int64_t low_row = (row + g) * p.k_blocks, high_row = (row + g + 8) * p.k_blocks;
  // With more pairs their products are work enough in flight, and registers scarce.
#pragma unroll(kTiles == 1 ? 4 : 1)
  for (int b = begin; b < end; ++b) {
    const uint32_t low_codes = reinterpret_cast<const uint32_t*>(p.blocks + (low_row + b) * kMxBlockBytes)[t];
    const uint32_t high_codes = reinterpret_cast<const uint32_t*>(p.blocks + (high_row + b) * kMxBlockBytes)[t];
    const float low_scale = scale_of(p.scales[low_row + b]), high_scale = scale_of(p.scales[high_row + b]);
    const uint4 low = decode8(low_codes), high = decode8(high_codes);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int64_t at = int64_t{b} * kMxBlock + 8 * t;
      const uint4 values = x[i] != nullptr ? linear_mma::load8(x[i], at, at + 8, x_aligned) : make_uint4(0, 0, 0, 0);
      float block[4] = {};
      linear_mma::multiply(block, low, high, values);
      acc[i][0] = __fmaf_rn(block[0], low_scale, acc[i][0]);
      acc[i][1] = __fmaf_rn(block[1], low_scale, acc[i][1]);
      acc[i][2] = __fmaf_rn(block[2], high_scale, acc[i][2]);
      acc[i][3] = __fmaf_rn(block[3], high_scale, acc[i][3]);
    }
  }
}

// Where the sum of a row and a pair of the tile stands among a block's elements.
__device__ __forceinline__ int element_of(int row, int pair) {
  const int column = pair % kTileTokens;
  return pair / kTileTokens * kTile + (row % 8 * 4 + column / 2) * 4 + row / 8 * 2 + column % 2;
}

// A block's elements, with their biases, to memory.
template <bool kGateUp>
__device__ __forceinline__ void write_tile(const Product& p, int expert, int row0, const int32_t* list, int pairs,
                                           const float* sums) {
  constexpr int kOutputs = kGateUp ? kTileRows / 2 : kTileRows;
  for (int i = static_cast<int>(threadIdx.x); i < pairs * kOutputs; i += kThreads) {
    const int pair = i / kOutputs, output = i % kOutputs;
    const int64_t row = list[pair], bias_row = int64_t{expert} * p.rows + row0;
    if (kGateUp) {
      const float gate = sums[element_of(2 * output, pair)] + bias_of(p, bias_row + 2 * output);
      const float up = sums[element_of(2 * output + 1, pair)] + bias_of(p, bias_row + 2 * output + 1);
      static_cast<bf16*>(p.y)[row * (p.rows / 2) + row0 / 2 + output] =
          narrow<bf16>(swiglu(gate, up, p.alpha, p.limit));
    } else {
      static_cast<float*>(p.y)[row * p.rows + row0 + output] =
          sums[element_of(output, pair)] + bias_of(p, bias_row + output);
    }
  }
}

// 16 weight rows by up to 8 * kTiles pairs of one expert.
template <int kTiles, bool kGateUp, typename X>
__device__ __forceinline__ void multiply_tile(const Product& p, int expert, const int32_t* list, int pairs,
                                              float* sums) {
  constexpr int kElements = kTiles * kTile;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int row0 = static_cast<int>(blockIdx.x) * kTileRows;
  const bool x_aligned = linear_mma::rows_aligned(static_cast<const X*>(p.x), p.x_stride);
  const X* x[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int pair = i * kTileTokens + lane / 4;
    x[i] = pair < pairs ? row_of<X>(p, list[pair]) : nullptr;
  }
  const int num_slices = (p.k_blocks + kSliceBlocks - 1) / kSliceBlocks;
  float totals[kElements / kThreads] = {};
  for (int first = 0; first < num_slices; first += kSlices) {
    const int slices = min(kSlices, num_slices - first);
    __syncthreads();  // what was there has been read
    for (int s = warp; s < slices; s += kWarps) {
      float acc[kTiles][4] = {};
      multiply_slice<kTiles>(p, int64_t{expert} * p.rows + row0, x, x_aligned, (first + s) * kSliceBlocks, acc);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        *reinterpret_cast<float4*>(sums + s * kElements + i * kTile + 4 * lane) =
            make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      }
    }
    __syncthreads();
    for (int s = 0; s < slices; ++s) {
#pragma unroll
      for (int i = 0; i < kElements / kThreads; ++i) {
        totals[i] += sums[s * kElements + i * kThreads + static_cast<int>(threadIdx.x)];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kElements / kThreads; ++i) sums[i * kThreads + static_cast<int>(threadIdx.x)] = totals[i];
  __syncthreads();
  write_tile<kGateUp>(p, expert, row0, list, pairs, sums);
}

// grid: (16 weight rows, tile of pairs or, for few pairs, expert).
template <int kTiles, bool kGateUp, typename X>
__global__ void __launch_bounds__(kThreads) mxfp4_moe_bf16_mxfp4_few_sm80_kernel(Product p) {
  constexpr int kPairs = kTiles * kTileTokens;
  float* sums = reinterpret_cast<float*>(ptx::dynamic_shared());  // [slice][tile][lane][4]
  int32_t* list = reinterpret_cast<int32_t*>(sums + kSlices * kTiles * kTile);
  ptx::wait_for_previous_kernel();
  ptx::release_next_kernel();
  const BlockPairs work = pairs_of_block(p.groups, list);
  __syncthreads();
  for (int first = 0; first < work.count; first += kPairs) {
    multiply_tile<kTiles, kGateUp, X>(p, work.expert, work.pairs + first, min(kPairs, work.count - first), sums);
  }
  if (!kGateUp && p.combine.arrived != nullptr) {
    const int row0 = static_cast<int>(blockIdx.x) * kTileRows;
    combine_last(p.combine, p.groups, row0, row0 + kTileRows, list + kFewPairs);
  }
}

// Nothing rounded: a warp an output, for up to 8 pairs; lanes take blocks of K, and one tree adds them up.
constexpr int kExactPairs = 8;

template <typename X>
__device__ __forceinline__ void exact_row(const Product& p, int64_t row, const X* const (&x)[kExactPairs],
                                          float (&sums)[kExactPairs]) {
#pragma unroll
  for (int i = 0; i < kExactPairs; ++i) sums[i] = 0.0f;
  for (int b = static_cast<int>(threadIdx.x) % kWarp; b < p.k_blocks; b += kWarp) {
    const uint8_t* codes = p.blocks + (row * p.k_blocks + b) * kMxBlockBytes;
    float block[kExactPairs] = {};
    for (int j = 0; j < kMxBlock / 8; ++j) {
      const uint4 v = decode8(reinterpret_cast<const uint32_t*>(codes)[j]);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < kExactPairs; ++i) {
        if (x[i] == nullptr) continue;
        const X* from = x[i] + int64_t{b} * kMxBlock + 8 * j;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          block[i] = __fmaf_rn(widen(from[2 * w]), widen_low(words[w]), block[i]);
          block[i] = __fmaf_rn(widen(from[2 * w + 1]), widen_high(words[w]), block[i]);
        }
      }
    }
    const float scale = scale_of(p.scales[row * p.k_blocks + b]);
#pragma unroll
    for (int i = 0; i < kExactPairs; ++i) sums[i] = __fmaf_rn(block[i], scale, sums[i]);
  }
#pragma unroll
  for (int i = 0; i < kExactPairs; ++i) sums[i] = warp_sum(sums[i]);
}

// grid: (outputs by fours, tile of pairs or, for few pairs, expert).
template <bool kGateUp, typename X>
__global__ void __launch_bounds__(kThreads) mxfp4_moe_f32_mxfp4_sm80_kernel(Product p) {
  int32_t* list = reinterpret_cast<int32_t*>(ptx::dynamic_shared());
  const int output = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  const int outputs = kGateUp ? p.rows / 2 : p.rows;
  ptx::wait_for_previous_kernel();
  ptx::release_next_kernel();
  const BlockPairs work = pairs_of_block(p.groups, list);
  __syncthreads();
  const int64_t row = int64_t{work.expert} * p.rows + (kGateUp ? 2 * output : output);
  for (int first = 0; first < work.count && output < outputs; first += kExactPairs) {
    const X* x[kExactPairs];
#pragma unroll
    for (int i = 0; i < kExactPairs; ++i) {
      x[i] = first + i < work.count ? row_of<X>(p, work.pairs[first + i]) : nullptr;
    }
    float sums[kExactPairs], up[kExactPairs];
    exact_row(p, row, x, sums);
    if (kGateUp) exact_row(p, row + 1, x, up);
    if (threadIdx.x % kWarp != 0) continue;
#pragma unroll
    for (int i = 0; i < kExactPairs; ++i) {
      if (x[i] == nullptr) continue;
      float y = sums[i] + bias_of(p, row);
      if (kGateUp) y = swiglu(y, up[i] + bias_of(p, row + 1), p.alpha, p.limit);
      static_cast<float*>(p.y)[int64_t{work.pairs[first + i]} * outputs + output] = y;
    }
  }
  if (!kGateUp && p.combine.arrived != nullptr) {
    const int first = static_cast<int>(blockIdx.x) * kWarps;
    combine_last(p.combine, p.groups, first, first + kWarps, list + kFewPairs);
  }
}

}  // namespace moe
}  // namespace cuda
}  // namespace mxmoe
