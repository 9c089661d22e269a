// Many pairs with mma.sync: a block takes 128 weight rows, 16 for each of eight warps, by 64 pairs of an expert,
// whose activations come through shared memory in stages of two blocks of K. Sums are formed as in
// mxfp4_moe_product.cuh: the bits are the same.
#pragma once

#include "ops/mxfp4_moe/mxfp4_moe_fragments.cuh"

namespace mxmoe {
namespace cuda {
namespace moe {
namespace many_sm80 {

constexpr int kBlockWarps = 8, kBlockThreads = kBlockWarps * kWarp;
constexpr int kBlockRows = kBlockWarps * kTileRows;
constexpr int kPairs = 64, kTiles = kPairs / kTileTokens;
constexpr int kStageBlocks = 2, kStages = 4;
constexpr int kRowBytes = kMxBlock * 2;  // of a pair's activations in a block: lanes read 128 bytes that touch
constexpr int kStageBytes = kStageBlocks * kPairs * kRowBytes;
static_assert(kSliceBlocks % kStageBlocks == 0, "slices end where stages do");

constexpr size_t shared_bytes() { return size_t{kStages} * kStageBytes + kPairs * sizeof(int64_t); }

__device__ __forceinline__ void load_stage(const Product& p, const int64_t* rows, int pairs, int stage,
                                           unsigned char* to) {
  constexpr int kPieces = kStageBlocks * kRowBytes / 16;
#pragma unroll
  for (int i = 0; i < kPairs * kPieces / kBlockThreads; ++i) {
    const int at = i * kBlockThreads + static_cast<int>(threadIdx.x), n = at / kPieces, piece = at % kPieces;
    const int b = piece / (kRowBytes / 16), block = stage * kStageBlocks + b;
    if (n < pairs && block < p.k_blocks) {
      const bf16* from = static_cast<const bf16*>(p.x) + rows[n] + stage * kStageBlocks * kMxBlock + 8 * piece;
      ptx::cp_async_16(to + (b * kPairs + n) * kRowBytes + piece % (kRowBytes / 16) * 16, from, true);
    }
  }
}

// A thread's codes and scales of a stage, of rows g and g + 8.
struct StageCodes {
  uint32_t codes[kStageBlocks][2];
  uint8_t scales[kStageBlocks][2];
};

__device__ __forceinline__ StageCodes load_codes(const Product& p, int64_t row, int stage) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  StageCodes s;
#pragma unroll
  for (int b = 0; b < kStageBlocks; ++b) {
    const int block = min(stage * kStageBlocks + b, p.k_blocks - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t at = (row + 8 * i) * p.k_blocks + block;
      s.codes[b][i] = reinterpret_cast<const uint32_t*>(p.blocks + at * kMxBlockBytes)[t];
      s.scales[b][i] = p.scales[at];
    }
  }
  return s;
}

__device__ __forceinline__ void multiply_block(const StageCodes& s, int b, const unsigned char* stage,
                                               float (&acc)[kPairs / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const uint4 low = decode8(s.codes[b][0]), high = decode8(s.codes[b][1]);
  const float low_scale = scale_of(s.scales[b][0]), high_scale = scale_of(s.scales[b][1]);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int row = b * kPairs + i * kTileTokens + lane / 4;
    const uint4 values = *reinterpret_cast<const uint4*>(stage + row * kRowBytes + lane % 4 * 16);
    float block[4] = {};
    linear_mma::multiply(block, low, high, values);
    acc[4 * i] = __fmaf_rn(block[0], low_scale, acc[4 * i]);
    acc[4 * i + 1] = __fmaf_rn(block[1], low_scale, acc[4 * i + 1]);
    acc[4 * i + 2] = __fmaf_rn(block[2], high_scale, acc[4 * i + 2]);
    acc[4 * i + 3] = __fmaf_rn(block[3], high_scale, acc[4 * i + 3]);
  }
}

// grid: (128 weight rows, tile of pairs). x is bfloat16, in rows that begin at 16 bytes.
template <bool kGateUp>
__global__ void __launch_bounds__(kBlockThreads, 2) mxfp4_moe_bf16_mxfp4_many_sm80_kernel(Product p) {
  unsigned char* stages = ptx::dynamic_shared();
  int64_t* rows = reinterpret_cast<int64_t*>(stages + kStages * kStageBytes);
  ptx::wait_for_previous_kernel();
  ptx::release_next_kernel();
  const BlockPairs work = pairs_of_block(p.groups, nullptr);
  if (work.count == 0) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  if (thread < work.count) rows[thread] = int64_t{work.pairs[thread] / p.pairs_per_row} * p.x_stride;
  __syncthreads();
  // A warp whose rows are missing multiplies the last ones, and writes nothing.
  const int row = static_cast<int>(blockIdx.x) * kBlockRows + warp * kTileRows;
  const int64_t weight_row = int64_t{work.expert} * p.rows + min(row, p.rows - kTileRows) + lane / 4;
  const int num_stages = (p.k_blocks + kStageBlocks - 1) / kStageBlocks;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < num_stages) load_stage(p, rows, work.count, s, stages + s * kStageBytes);
    ptx::cp_async_commit();
  }
  StageCodes next = load_codes(p, weight_row, 0);
  float totals[kPairs / 2] = {}, acc[kPairs / 2] = {};
  for (int s = 0; s < num_stages; ++s) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    const int later = s + kStages - 1;  // takes the place of the stage before this one
    if (later < num_stages) load_stage(p, rows, work.count, later, stages + later % kStages * kStageBytes);
    ptx::cp_async_commit();
    const StageCodes now = next;
    if (s + 1 < num_stages) next = load_codes(p, weight_row, s + 1);
#pragma unroll
    for (int b = 0; b < kStageBlocks; ++b) {
      if (s * kStageBlocks + b < p.k_blocks) multiply_block(now, b, stages + s % kStages * kStageBytes, acc);
    }
    if ((s + 1) % (kSliceBlocks / kStageBlocks) != 0 && s + 1 < num_stages) continue;
#pragma unroll
    for (int i = 0; i < kPairs / 2; ++i) totals[i] += acc[i], acc[i] = 0.0f;
  }
  const int own = row + lane / 4;
  if constexpr (kGateUp) {
    activate<kPairs>(p, work.expert, own, totals, [&](int j, int output, const float (&y)[2]) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int n = 8 * j + 2 * (lane % 4) + c;
        if (n >= work.count || output >= p.rows / 2) continue;
        static_cast<bf16*>(p.y)[int64_t{work.pairs[n]} * (p.rows / 2) + output] = narrow<bf16>(y[c]);
      }
    });
  } else {
    write_rows<kPairs>(p, work.expert, own, work.pairs, work.count, totals);
  }
}

}  // namespace many_sm80
}  // namespace moe
}  // namespace cuda
}  // namespace mxmoe
