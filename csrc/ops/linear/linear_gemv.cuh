// Few tokens: a block takes 16 weight rows, its warps the slices of K; weights go from memory to registers once.
#pragma once

#include "ops/linear/linear_mma.cuh"

namespace mxmoe {
namespace cuda {
namespace linear_mma {

constexpr int kGemvWarps = 4;
constexpr int kGemvThreads = kGemvWarps * kWarp;
constexpr int kGemvSlices = 16;  // whose sums shared memory holds at a time
// On a multiprocessor at once: three blocks' registers hold 72 KiB of weights that are on their way.
template <bool kStaged>
constexpr int kGemvBlocks = kStaged ? 3 : 2;

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

// Tokens of one tile may be brought to shared memory as bfloat16, once for all warps; a row's length there makes
// the lanes of a 16-byte read fall into different banks.
constexpr int64_t kMaxStagedBytes = 64 << 10;
__host__ __device__ constexpr int64_t staged_stride(int64_t k) { return (k + 63) / 64 * 64 + 32; }

template <int kTiles>
__host__ __device__ constexpr size_t gemv_shared_bytes() {
  return sizeof(float) * kGemvSlices * kTiles * kTileRows * kTileTokens;
}

// Rows g and g + 8 of a tile of weights, for lane (g, t); null where the layer has no such row.
struct GemvRows {
  const bf16 *low, *high;
};

// The weights of one step of each of a warp's slices, in registers. Wide: rows of whole, aligned pieces of 16 bytes.
struct GemvWeights {
  uint4 low[kSliceSteps], high[kSliceSteps];
};
__device__ __forceinline__ void fetch_weights(GemvWeights& w, int step, const GemvRows& rows, int64_t at, int64_t k) {
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  w.low[step] = rows.low != nullptr && at < k ? ptx::load_once_16(rows.low + at) : nothing;
  w.high[step] = rows.high != nullptr && at < k ? ptx::load_once_16(rows.high + at) : nothing;
}
__device__ __forceinline__ void fetch_first_weights(GemvWeights& w, const GemvRows& rows, int64_t k) {
  const int64_t begin = int64_t{threadIdx.x / kWarp} * kSlice + threadIdx.x % 4 * 8;
#pragma unroll
  for (int step = 0; step < kSliceSteps; ++step) fetch_weights(w, step, rows, begin + step * kStep, k);
}

// The sums of 16 weight rows with kTiles * 8 tokens, a slice a warp at a time. tokens(tile, k) gives a lane's eight
// values of token g of a tile, zeros where there are none. Afterwards thread i has elements i, i + kGemvThreads ...
// of [tile][lane][4]. With kWide `w` holds what fetch_first_weights brought, and each step is asked for a whole slice
// before it is used.
template <int kTiles, bool kWide, typename Tokens>
__device__ __forceinline__ void gemv_sums(GemvWeights& w, const GemvRows& rows, int64_t k, const Tokens& tokens,
                                          float* sums, float (&totals)[kTiles]) {
  constexpr int kTile = kTileRows * kTileTokens, kElements = kTiles * kTile;
  static_assert(kTile == kGemvThreads, "an element of each tile for every thread");
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t num_slices = (k + kSlice - 1) / kSlice;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) totals[i] = 0.0f;
  for (int64_t first = 0; first < num_slices; first += kGemvSlices) {
    const int slices = static_cast<int>(min(int64_t{kGemvSlices}, num_slices - first));
    if (first > 0) __syncthreads();
    for (int s = warp; s < slices; s += kGemvWarps) {
      float acc[kTiles][4] = {};
      const int64_t begin = (first + s) * kSlice + lane % 4 * 8;
      if constexpr (kWide) {
#pragma unroll
        for (int step = 0; step < kSliceSteps; ++step) {
          const int64_t at = begin + step * kStep;
#pragma unroll
          for (int i = 0; i < kTiles; ++i) multiply(acc[i], w.low[step], w.high[step], tokens(i, at));
          fetch_weights(w, step, rows, at + kGemvWarps * kSlice, k);
        }
      } else {
        const uint4 nothing = make_uint4(0, 0, 0, 0);
        const int64_t end = min((first + s + 1) * kSlice, k + lane % 4 * 8);
        for (int64_t at = begin; at < end; at += kStep) {
          const uint4 low = rows.low != nullptr ? load8(rows.low, at, k, false) : nothing;
          const uint4 high = rows.high != nullptr ? load8(rows.high, at, k, false) : nothing;
#pragma unroll
          for (int i = 0; i < kTiles; ++i) multiply(acc[i], low, high, tokens(i, at));
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        *reinterpret_cast<float4*>(sums + s * kElements + i * kTile + 4 * lane) =
            make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      }
    }
    __syncthreads();
    for (int s = 0; s < slices; ++s) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) totals[i] += sums[s * kElements + i * kTile + static_cast<int>(threadIdx.x)];
    }
  }
}

// Which element of a tile a thread ends with.
struct GemvElement {
  int row, token;
};
__device__ __forceinline__ GemvElement own_element() {
  const int of_lane = static_cast<int>(threadIdx.x) / 4, c = static_cast<int>(threadIdx.x) % 4;
  return {of_lane / 4 + c / 2 * 8, 2 * (of_lane % 4) + c % 2};
}

// x as the products take it, from global memory or, once staged, from shared.
template <typename X>
struct GlobalTokens {
  const X* x;  // of the block's first token
  int64_t stride, k, tokens_left;
  bool aligned;
  __device__ __forceinline__ uint4 operator()(int tile, int64_t at) const {
    const int64_t token = tile * kTileTokens + static_cast<int>(threadIdx.x) % kWarp / 4;
    return token < tokens_left ? load8(x + token * stride, at, k, aligned) : make_uint4(0, 0, 0, 0);
  }
};
struct StagedTokens {
  const bf16* x;
  int64_t stride, k;
  int tokens;
  __device__ __forceinline__ uint4 operator()(int, int64_t at) const {
    const int token = static_cast<int>(threadIdx.x) % kWarp / 4;
    if (token >= tokens || at >= k) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(x + token * stride + at);
  }
};

// Up to eight tokens to shared memory.
template <typename X>
__device__ __forceinline__ StagedTokens stage(const GlobalTokens<X>& from, bf16* to) {
  const StagedTokens staged{to, staged_stride(from.k), from.k,
                            static_cast<int>(min(int64_t{kTileTokens}, from.tokens_left))};
  const int pieces = static_cast<int>((from.k + 7) / 8);
  for (int i = static_cast<int>(threadIdx.x); i < staged.tokens * pieces; i += kGemvThreads) {
    const int token = i / pieces, at = i % pieces * 8;
    *reinterpret_cast<uint4*>(to + token * staged.stride + at) =
        load8(from.x + token * from.stride, at, from.k, from.aligned);
  }
  __syncthreads();
  return staged;
}

// kStaged: for one tile of tokens, whose rows shared memory holds behind the sums.
template <int kTiles, bool kStaged, bool kWide, typename X>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<kStaged>)
    linear_bf16_bf16_gemv_sm80_kernel(const X* x, int64_t x_stride, int64_t num_tokens, int64_t k,
                                      GemvLayers layers) {
  float* sums = reinterpret_cast<float*>(ptx::dynamic_shared());  // [slice][tile][lane][4]
  const GemvLayer layer = layer_of_block(layers);
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int64_t row0 = int64_t{blockIdx.x - layer.first_block} * kTileRows;
  const int64_t token0 = int64_t{blockIdx.y} * kTiles * kTileTokens;
  const bf16* own = layer.weight + (row0 + g) * layer.weight_stride;
  const GemvRows rows{row0 + g < layer.out_features ? own : nullptr,
                      row0 + g + 8 < layer.out_features ? own + 8 * layer.weight_stride : nullptr};
  GemvWeights weights;
  if constexpr (kWide) fetch_first_weights(weights, rows, k);
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();

  float totals[kTiles];
  const GlobalTokens<X> tokens{x + token0 * x_stride, x_stride, k, num_tokens - token0, rows_aligned(x, x_stride)};
  if constexpr (kStaged) {
    static_assert(kTiles == 1, "what is staged is one tile");
    const StagedTokens staged = stage(tokens, reinterpret_cast<bf16*>(sums + gemv_shared_bytes<1>() / sizeof(float)));
    gemv_sums<kTiles, kWide>(weights, rows, k, staged, sums, totals);
  } else {
    gemv_sums<kTiles, kWide>(weights, rows, k, tokens, sums, totals);
  }
  const GemvElement element = own_element();
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t row = row0 + element.row, token = token0 + i * kTileTokens + element.token;
    if (row < layer.out_features && token < num_tokens) finish(layer.epilogue, token, row, totals[i]);
  }
}

}  // namespace linear_mma
}  // namespace cuda
}  // namespace mxmoe
