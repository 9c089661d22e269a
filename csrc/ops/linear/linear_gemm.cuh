// Many tokens: a block takes 128 weight rows by 128 tokens; both operands come through shared memory, three steps of
// K deep. A row of a step is 64 bytes, so that two rows fill the banks and 16-byte reads of 8 lanes never collide.
#pragma once

#include "ops/linear/linear_mma.cuh"

namespace mxmoe {
namespace cuda {
namespace linear_mma {

constexpr int kGemmRows = 128, kGemmTokens = 128;
constexpr int kGemmWarpRows = 2, kGemmWarpTokens = 4;  // warps along each side
constexpr int kGemmThreads = kGemmWarpRows * kGemmWarpTokens * kWarp;
constexpr int kRowTiles = kGemmRows / kGemmWarpRows / kTileRows;          // of a warp
constexpr int kTokenTiles = kGemmTokens / kGemmWarpTokens / kTileTokens;  // of a warp
constexpr int kStages = 3;
constexpr int kStageValues = (kGemmRows + kGemmTokens) * kStep;
constexpr size_t kGemmSharedBytes = sizeof(bf16) * kStages * kStageValues;

// Rows [first, first + 128) of a matrix, one step of K, to shared memory; zeros outside the matrix.
__device__ __forceinline__ void fetch(bf16* to, const bf16* matrix, int64_t stride, int64_t first, int64_t num_rows,
                                      int64_t k0, int64_t k, bool aligned) {
  constexpr int kPieces = kStep / 8;  // of 16 bytes in a row
  static_assert(kGemmRows == kGemmTokens, "one loop serves both operands");
#pragma unroll
  for (int i = 0; i < kGemmRows * kPieces / kGemmThreads; ++i) {
    const int piece = i * kGemmThreads + static_cast<int>(threadIdx.x);
    const int64_t row = first + piece / kPieces, at = k0 + piece % kPieces * 8;
    const bool inside = row < num_rows && at < k;
    bf16* place = to + piece * 8;
    if (aligned && (!inside || at + 8 <= k)) {
      ptx::cp_async_16(place, inside ? matrix + row * stride + at : matrix, inside);
    } else {
      *reinterpret_cast<uint4*>(place) = inside ? load8(matrix + row * stride, at, k, false) : make_uint4(0, 0, 0, 0);
    }
  }
}

__device__ __forceinline__ uint4 fragment(const bf16* rows, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return *reinterpret_cast<const uint4*>(rows + (row + lane / 4) * kStep + lane % 4 * 8);
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    linear_bf16_bf16_sm80_kernel(const bf16* x, int64_t x_stride, int64_t num_tokens, const bf16* weight,
                                 int64_t weight_stride, int64_t out_features, int64_t k, Epilogue epilogue) {
  bf16* shared = reinterpret_cast<bf16*>(ptx::dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp % kGemmWarpRows * kRowTiles * kTileRows;
  const int warp_token = warp / kGemmWarpRows * kTokenTiles * kTileTokens;
  const int64_t row0 = int64_t{blockIdx.x} * kGemmRows, token0 = int64_t{blockIdx.y} * kGemmTokens;
  const bool x_aligned = rows_aligned(x, x_stride), weight_aligned = rows_aligned(weight, weight_stride);
  const int64_t steps = (k + kStep - 1) / kStep;
  const auto fetch_step = [&](int64_t step) {
    if (step < steps) {
      bf16* stage = shared + step % kStages * kStageValues;
      fetch(stage, weight, weight_stride, row0, out_features, step * kStep, k, weight_aligned);
      fetch(stage + kGemmRows * kStep, x, x_stride, token0, num_tokens, step * kStep, k, x_aligned);
    }
    ptx::cp_async_commit();  // also when empty, so that the count of groups stays that of steps
  };
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  fetch_step(0);
  fetch_step(1);

  float totals[kRowTiles][kTokenTiles][4] = {}, acc[kRowTiles][kTokenTiles][4] = {};
  int in_slice = 0;
  for (int64_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step has come for all; the stage that is fetched next has been read by all
    fetch_step(step + kStages - 1);
    const bf16* weights = shared + step % kStages * kStageValues + warp_row * kStep;
    const bf16* tokens = shared + step % kStages * kStageValues + (kGemmRows + warp_token) * kStep;
    uint4 b[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) b[j] = fragment(tokens, j * kTileTokens);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const uint4 low = fragment(weights, i * kTileRows), high = fragment(weights, i * kTileRows + 8);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) multiply(acc[i][j], low, high, b[j]);
    }
    if (++in_slice < kSliceSteps && step + 1 < steps) continue;
    in_slice = 0;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) totals[i][j][c] += acc[i][j][c], acc[i][j][c] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t row = row0 + warp_row + i * kTileRows + lane / 4 + c / 2 * 8;
        const int64_t token = token0 + warp_token + j * kTileTokens + 2 * (lane % 4) + c % 2;
        if (row < out_features && token < num_tokens) finish(epilogue, token, row, totals[i][j][c]);
      }
    }
  }
}

}  // namespace linear_mma
}  // namespace cuda
}  // namespace mxmoe
