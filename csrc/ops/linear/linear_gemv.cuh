// Few tokens: a block takes 16 weight rows, its warps the slices of K; weights go from memory to registers once.
#pragma once

#include "ops/linear/linear_mma.cuh"

namespace mxmoe {
namespace cuda {
namespace linear_mma {

constexpr int kGemvWarps = 4;
constexpr int kGemvThreads = kGemvWarps * kWarp;
constexpr int kGemvSlices = 16;  // whose sums shared memory holds at a time

// Layers of the same input, side by side in one launch.
constexpr int kMaxGemvLayers = 4;
struct GemvLayer {
  const bf16* weight;
  int64_t weight_stride, out_features;
  unsigned first_block;
  Epilogue epilogue;
};
struct GemvLayers {
  GemvLayer of[kMaxGemvLayers];
  int count;
};

__device__ __forceinline__ GemvLayer layer_of_block(const GemvLayers& layers) {
  GemvLayer layer = layers.of[0];
#pragma unroll
  for (int i = 1; i < kMaxGemvLayers; ++i) {  // by constant indices, which need no memory of the thread's own
    if (i < layers.count && blockIdx.x >= layers.of[i].first_block) layer = layers.of[i];
  }
  return layer;
}

template <int kTiles>
constexpr size_t gemv_shared_bytes() {
  return sizeof(float) * kGemvSlices * kTiles * kTileRows * kTileTokens;
}

// Sums of one slice for 16 rows and kTiles * 8 tokens.
template <int kTiles, typename X>
__device__ __forceinline__ void gemv_slice(const bf16* weight, int64_t weight_stride, int64_t rows_left,
                                           bool weight_aligned, const X* x, int64_t x_stride, int64_t tokens_left,
                                           bool x_aligned, int64_t begin, int64_t k, float (&acc)[kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  const int64_t end = min(begin + kSlice, k);
#pragma unroll 4
  for (int64_t k0 = begin; k0 < end; k0 += kStep) {
    const int64_t at = k0 + 8 * t;
    const uint4 low = g < rows_left ? load8(weight + g * weight_stride, at, k, weight_aligned) : nothing;
    const uint4 high = g + 8 < rows_left ? load8(weight + (g + 8) * weight_stride, at, k, weight_aligned) : nothing;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int token = i * kTileTokens + g;
      multiply(acc[i], low, high, token < tokens_left ? load8(x + token * x_stride, at, k, x_aligned) : nothing);
    }
  }
}

template <int kTiles, typename X>
__global__ void __launch_bounds__(kGemvThreads)
    linear_bf16_bf16_gemv_sm80_kernel(const X* x, int64_t x_stride, int64_t num_tokens, int64_t k,
                                      GemvLayers layers) {
  constexpr int kTile = kTileRows * kTileTokens, kElements = kTiles * kTile;
  float* sums = reinterpret_cast<float*>(ptx::dynamic_shared());  // [slice][tile][lane][4]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const GemvLayer layer = layer_of_block(layers);
  const int64_t row0 = int64_t{blockIdx.x - layer.first_block} * kTileRows;
  const int64_t token0 = int64_t{blockIdx.y} * kTiles * kTileTokens;
  const bool x_aligned = rows_aligned(x, x_stride), weight_aligned = rows_aligned(layer.weight, layer.weight_stride);
  const int64_t num_slices = (k + kSlice - 1) / kSlice;
  float totals[kElements / kGemvThreads] = {};
  ptx::wait_for_previous_kernel();

  for (int64_t first = 0; first < num_slices; first += kGemvSlices) {
    const int slices = static_cast<int>(min(int64_t{kGemvSlices}, num_slices - first));
    if (first > 0) __syncthreads();
    for (int s = warp; s < slices; s += kGemvWarps) {
      float acc[kTiles][4] = {};
      gemv_slice<kTiles>(layer.weight + row0 * layer.weight_stride, layer.weight_stride, layer.out_features - row0,
                         weight_aligned, x + token0 * x_stride, x_stride, num_tokens - token0, x_aligned,
                         (first + s) * kSlice, k, acc);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        *reinterpret_cast<float4*>(sums + s * kElements + i * kTile + 4 * lane) =
            make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      }
    }
    __syncthreads();
    for (int s = 0; s < slices; ++s) {
#pragma unroll
      for (int i = 0; i < kElements / kGemvThreads; ++i) {
        totals[i] += sums[s * kElements + i * kGemvThreads + static_cast<int>(threadIdx.x)];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kElements / kGemvThreads; ++i) {
    const int element = i * kGemvThreads + static_cast<int>(threadIdx.x);
    const int tile = element / kTile, of_lane = element % kTile / 4, c = element % 4;
    const int64_t row = row0 + of_lane / 4 + c / 2 * 8;
    const int64_t token = token0 + tile * kTileTokens + 2 * (of_lane % 4) + c % 2;
    if (row < layer.out_features && token < num_tokens) finish(layer.epilogue, token, row, totals[i]);
  }
}

}  // namespace linear_mma
}  // namespace cuda
}  // namespace mxmoe
