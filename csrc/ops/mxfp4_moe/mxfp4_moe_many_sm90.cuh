// Many pairs on Hopper: a block takes 128 weight rows, 64 for each of two warpgroups, by a tile of an expert's pairs.
// Activations come through shared memory in stages of a step, gathered by pair; a warpgroup decodes half a step of
// its weights while the products of the half before it run.
#pragma once

#include "ops/mxfp4_moe/mxfp4_moe_wgmma.cuh"

namespace mxmoe {
namespace cuda {
namespace moe {

constexpr int kManyGroups = 2;  // warpgroups
constexpr int kManyThreads = kManyGroups * kGroupThreadsWgmma;
constexpr int kManyRows = kManyGroups * kGroupRows;
constexpr int kStages = 4;
constexpr int kStagesAhead = kStages - 2;  // the products of the step before may still read theirs

template <int kPairs>
constexpr size_t many_shared_bytes() {
  return size_t{kStages} * kPairs * kStep * sizeof(bf16) + kPairs * sizeof(int64_t);
}

// A step of the tile's activations on its way. `rows` are where the pairs' begin.
template <int kPairs>
__device__ __forceinline__ void load_stage(const Product& p, const int64_t* rows, int pairs, int step,
                                           unsigned char* stage) {
  constexpr int kPieces = kStep / 8, kAtOnce = kManyThreads / kPieces;
  const int c = static_cast<int>(threadIdx.x) % kPieces;
#pragma unroll
  for (int i = 0; i < kPairs / kAtOnce; ++i) {
    const int n = i * kAtOnce + static_cast<int>(threadIdx.x) / kPieces;
    if (n < pairs) {
      const bf16* from = static_cast<const bf16*>(p.x) + rows[n] + step * kStep + 8 * c;
      ptx::cp_async_16(stage + piece_offset<kPairs>(n, c), from, true);
    }
  }
}

// Half a step: words 2 h and 2 h + 1 to the left operands of four products, which then run as a group.
template <int kPairs>
__device__ __forceinline__ void multiply_half(const StepCodes& codes, const uint32_t (&factors)[2], int h,
                                              const unsigned char* stage, bool first_of_slice, uint32_t (&a)[2][2][4],
                                              float (&acc)[kPairs / 2]) {
#pragma unroll
  for (int w = 0; w < 2; ++w) decode_word(codes, factors, 2 * h + w, a[w]);
  ptx::wgmma_hold(acc);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    ptx::wgmma_bf16<kPairs>(acc, a[i / 2][i % 2], right_operand<kPairs>(stage, 4 * h + i),
                            !(first_of_slice && i == 0));
  }
  ptx::wgmma_commit();
}

// Each lane writes two outputs of one pair that lie next to each other, when it has exchanged one with its partner.
template <int kPairs>
__device__ __forceinline__ void write_activations(const Product& p, int expert, int row, const int32_t* list,
                                                  int pairs, const float (&sums)[kPairs / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool odd = lane / 4 % 2 != 0;
  const int even_output = (odd ? row - 1 : row) / 2;  // and even_output + 4, its partner's, right behind
  activate<kPairs>(p, expert, row, sums, [&](int j, int, const float (&y)[2]) {
    const float partner = __shfl_xor_sync(kAllLanes, odd ? y[0] : y[1], 4);
    const int n = 8 * j + 2 * (lane % 4) + (odd ? 1 : 0);
    if (n >= pairs || even_output >= p.rows / 2) return;
    const uint32_t both = odd ? ptx::pack_bf16(partner, y[1]) : ptx::pack_bf16(y[0], partner);
    static_cast<uint32_t*>(p.y)[(list[n] * padded(p.rows / 2) + place_of(even_output)) / 2] = both;
  });
}

// grid: (128 weight rows, tile of pairs). x is bfloat16 by places, whole steps to a row.
template <int kPairs, bool kGateUp>
__global__ void __launch_bounds__(kManyThreads, kPairs == 64 ? 2 : 1)
    mxfp4_moe_bf16_mxfp4_many_sm90_kernel(Product p) {
#if MXMOE_HOPPER
  constexpr int kStageBytes = kPairs * kStep * 2;
  unsigned char* stages = ptx::dynamic_shared();
  int64_t* rows = reinterpret_cast<int64_t*>(stages + kStages * kStageBytes);
  ptx::wait_for_previous_kernel();
  ptx::release_next_kernel();
  const BlockPairs work = pairs_of_block(p.groups, nullptr);
  if (work.count == 0) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  for (int n = thread; n < work.count; n += kManyThreads) {
    rows[n] = int64_t{work.pairs[n] / p.pairs_per_row} * p.x_stride;
  }
  __syncthreads();
  const int row = static_cast<int>(blockIdx.x) * kManyRows + 16 * warp + lane / 4;
  const WeightLane weights = weight_lane(p, work.expert, row - lane / 4);
  const int num_steps = (p.k_blocks + kStepBlocks - 1) / kStepBlocks;
  for (int s = 0; s < kStagesAhead; ++s) {
    if (s < num_steps) load_stage<kPairs>(p, rows, work.count, s, stages + s * kStageBytes);
    ptx::cp_async_commit();
  }
  StepCodes next = load_step(weights, 0);
  float totals[kPairs / 2] = {}, acc[kPairs / 2] = {};
  uint32_t a[2][2][2][4];
  for (int first = 0; first < num_steps; first += kSliceSteps) {
    const int end = min(first + kSliceSteps, num_steps);
    for (int s = first; s < end; ++s) {
      ptx::cp_async_wait<kStagesAhead - 1>();
      ptx::fence_proxy_async();
      __syncthreads();
      const int later = s + kStagesAhead;
      if (later < num_steps) load_stage<kPairs>(p, rows, work.count, later, stages + later % kStages * kStageBytes);
      ptx::cp_async_commit();
      const StepCodes now = next;
      if (s + 1 < num_steps) next = load_step(weights, s + 1);
      const uint32_t factors[2] = {factor_of(now.scales[0]), factor_of(now.scales[1])};
      const unsigned char* stage = stages + s % kStages * kStageBytes;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        multiply_half<kPairs>(now, factors, h, stage, s == first && h == 0, a[h], acc);
        ptx::wgmma_wait<1>();  // the other half's registers are free again
      }
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(acc);
#pragma unroll
    for (int i = 0; i < kPairs / 2; ++i) totals[i] += acc[i];
  }
  if constexpr (kGateUp) {
    write_activations<kPairs>(p, work.expert, row, work.pairs, work.count, totals);
    const int outputs = p.rows / 2, missing = static_cast<int>(padded(outputs)) - outputs;
    if (blockIdx.x == gridDim.x - 1) {
      for (int i = thread; i < work.count * missing; i += kManyThreads) {
        write_padding(p, work.pairs[i / missing], outputs + i % missing);
      }
    }
  } else {
    write_rows<kPairs>(p, work.expert, row, work.pairs, work.count, totals);
  }
#endif
}

}  // namespace moe
}  // namespace cuda
}  // namespace mxmoe
