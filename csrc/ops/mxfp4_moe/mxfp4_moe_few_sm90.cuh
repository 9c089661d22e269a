// Few pairs on Hopper: a block takes 64 weight rows and all pairs of one expert, its two warpgroups the slices of K
// by turns. Weights go from memory to registers once, the next three steps' while one is multiplied; activations lie
// in shared memory whole.
#pragma once

#include <type_traits>

#include "ops/mxfp4_moe/mxfp4_moe_wgmma.cuh"

namespace mxmoe {
namespace cuda {
namespace moe {

constexpr int kFewGroups = 2;  // warpgroups
constexpr int kFewThreads = kFewGroups * kGroupThreadsWgmma;
constexpr int kGroupSlices = 2;  // of a warpgroup in a round, whose activations shared memory holds
constexpr int kRoundSlices = kFewGroups * kGroupSlices;
constexpr int kRoundSteps = kRoundSlices * kSliceSteps;
constexpr int kAhead = 3;  // steps of weights on their way
static_assert(kSliceSteps % kAhead == 0, "a step's registers are known when the kernel is compiled");

template <int kPairs>
constexpr size_t few_shared_bytes() {
  return size_t{kRoundSteps} * kPairs * kStep * sizeof(bf16) + kListBytes;
}

// Steps [first, first + kRoundSteps) of the pairs' activations; X is what x holds, void: bfloat16 by places.
template <int kPairs, typename X>
__device__ __forceinline__ void load_pairs(const Product& p, const int32_t* list, int pairs, int first,
                                           unsigned char* tile) {
  const int steps = min(kRoundSteps, (p.k_blocks + kStepBlocks - 1) / kStepBlocks - first);
  const int pieces = steps * (kStep / 8);
  if constexpr (std::is_void<X>::value) {
    for (int i = static_cast<int>(threadIdx.x); i < pairs * pieces; i += kFewThreads) {
      const int n = i / pieces, c = i % pieces;
      const bf16* from = row_of<bf16>(p, list[n]) + first * kStep + 8 * c;
      ptx::cp_async_16(tile + piece_offset<kPairs>(n, c), from, true);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  } else {
    const bool aligned = linear_mma::rows_aligned(static_cast<const X*>(p.x), p.x_stride);
    for (int i = static_cast<int>(threadIdx.x); i < pairs * pieces; i += kFewThreads) {
      const int n = i / pieces, eight = i % pieces;
      const int64_t k = int64_t{p.k_blocks} * kMxBlock, at = first * kStep + 8 * eight;
      const uint4 v = interleave(linear_mma::load8(row_of<X>(p, list[n]), at, k, aligned));
      const int place = static_cast<int>(first_place_of(eight));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        *reinterpret_cast<uint32_t*>(tile + piece_offset<kPairs>(n, place / 8 + r) + place % 8 * 2) = word_of(v, r);
      }
    }
  }
  ptx::fence_proxy_async();
}

// Step s, counted over a warpgroup's slices, of a round that begins at `first`.
__device__ __forceinline__ int step_of(int first, int s) {
  const int group = static_cast<int>(threadIdx.x) / kGroupThreadsWgmma;
  return first + (s / kSliceSteps * kFewGroups + group) * kSliceSteps + s % kSliceSteps;
}

template <int kPairs>
__device__ __forceinline__ void multiply_step(const StepCodes& codes, const unsigned char* tile, bool accumulate,
                                              uint32_t (&a)[2][2][4], float (&acc)[kPairs / 2]) {
  const uint32_t factors[2] = {factor_of(codes.scales[0]), factor_of(codes.scales[1])};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    decode_word(codes, factors, w, a[w % 2]);
    ptx::wgmma_hold(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::wgmma_bf16<kPairs>(acc, a[w % 2][i], right_operand<kPairs>(tile, 2 * w + i), accumulate || w + i > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the other registers are free again
  }
}

// The slices of a round.
template <int kPairs>
__device__ __forceinline__ void multiply_round(const Product& p, const WeightLane& rows, int first,
                                               StepCodes (&ahead)[kAhead], const unsigned char* tile,
                                               float (&acc)[kGroupSlices][kPairs / 2]) {
  const int num_steps = (p.k_blocks + kStepBlocks - 1) / kStepBlocks;
  uint32_t a[2][2][4];
#pragma unroll
  for (int slice = 0; slice < kGroupSlices; ++slice) {
#pragma unroll 1
    for (int s = 0; s < kSliceSteps; s += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int own = slice * kSliceSteps + s + i, step = step_of(first, own);
        if (step < num_steps) {
          multiply_step<kPairs>(ahead[i], tile + (step - first) * (kPairs * kStep * 2), s + i > 0, a, acc[slice]);
        }
        if (own + kAhead < kGroupSlices * kSliceSteps) {
          ahead[i] = load_step(rows, step_of(first, own + kAhead));
        }
      }
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(acc[slice]);
  }
}

// Where the sum of a row and a pair stands among a slice's.
template <int kPairs>
__device__ __forceinline__ int sum_of(int row, int pair) {
  return pair * kGroupRows + row;
}

template <int kPairs, bool kGateUp>
__device__ __forceinline__ void write_few(const Product& p, int expert, int row0, const int32_t* list, int pairs,
                                          const float* sums) {
  constexpr int kOutputs = kGateUp ? kGroupRows / 2 : kGroupRows;
  const int64_t bias_row = int64_t{expert} * p.rows + row0;
  for (int i = static_cast<int>(threadIdx.x); i < pairs * kOutputs; i += kFewThreads) {
    const int n = i / kOutputs, output = i % kOutputs;
    if (row0 + (kGateUp ? 2 * output : output) >= p.rows) continue;
    const int64_t pair = list[n];
    if (kGateUp) {
      const float gate = sums[sum_of<kPairs>(2 * output, n)] + bias_of(p, bias_row + 2 * output);
      const float up = sums[sum_of<kPairs>(2 * output + 1, n)] + bias_of(p, bias_row + 2 * output + 1);
      static_cast<bf16*>(p.y)[pair * padded(p.rows / 2) + place_of(row0 / 2 + output)] =
          narrow<bf16>(swiglu(gate, up, p.alpha, p.limit));
    } else {
      static_cast<float*>(p.y)[pair * p.rows + row0 + output] =
          sums[sum_of<kPairs>(output, n)] + bias_of(p, bias_row + output);
    }
  }
  if (!kGateUp || row0 + kGroupRows < p.rows) return;
  const int outputs = p.rows / 2, missing = static_cast<int>(padded(outputs)) - outputs;
  for (int i = static_cast<int>(threadIdx.x); i < pairs * missing; i += kFewThreads) {
    write_padding(p, list[i / missing], outputs + i % missing);
  }
}

// 64 rows by up to kPairs pairs; the weights of each warpgroup's first steps are on their way.
template <int kPairs, bool kGateUp, typename X>
__device__ __forceinline__ void few_tile(const Product& p, const WeightLane& rows, int expert, const int32_t* list,
                                         int pairs, StepCodes (&ahead)[kAhead], unsigned char* tile) {
  const int group = static_cast<int>(threadIdx.x) / kGroupThreadsWgmma;
  const int warp = static_cast<int>(threadIdx.x) / kWarp % 4, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int num_steps = (p.k_blocks + kStepBlocks - 1) / kStepBlocks;
  constexpr int kSums = kPairs * kGroupRows, kElements = kSums / kFewThreads;
  float* sums = reinterpret_cast<float*>(tile);  // when the activations have been used
  float totals[kElements] = {};
  for (int first = 0; first < num_steps; first += kRoundSteps) {
    if (first > 0) {
#pragma unroll
      for (int s = 0; s < kAhead; ++s) ahead[s] = load_step(rows, step_of(first, s));
    }
    __syncthreads();  // what was there has been read
    load_pairs<kPairs, X>(p, list, pairs, first, tile);
    __syncthreads();
    float acc[kGroupSlices][kPairs / 2] = {};
    multiply_round<kPairs>(p, rows, first, ahead, tile, acc);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kGroupSlices * kPairs / 2; ++i) {
      const int slice = i / (kPairs / 2), e = i % (kPairs / 2);
      const int row = 16 * warp + lane / 4 + e % 4 / 2 * 8, n = e / 4 * 8 + 2 * (lane % 4) + e % 2;
      sums[(slice * kFewGroups + group) * kSums + sum_of<kPairs>(row, n)] = acc[slice][e];
    }
    __syncthreads();
    const int slices = min(kRoundSlices, (num_steps - first + kSliceSteps - 1) / kSliceSteps);
    for (int s = 0; s < slices; ++s) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        totals[i] += sums[s * kSums + i * kFewThreads + static_cast<int>(threadIdx.x)];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kElements; ++i) sums[i * kFewThreads + static_cast<int>(threadIdx.x)] = totals[i];
  __syncthreads();
  write_few<kPairs, kGateUp>(p, expert, static_cast<int>(blockIdx.x) * kGroupRows, list, pairs, sums);
}

__device__ __forceinline__ void wait_and_release() {
  ptx::wait_for_previous_kernel();
  ptx::release_next_kernel();
}

// grid: (64 weight rows, expert). X is what x holds; void: bfloat16 by places.
template <int kPairs, bool kGateUp, typename X>
__global__ void __launch_bounds__(kFewThreads, kPairs == 8    ? 3
                                               : kPairs == 16 ? 2
                                                              : 1) mxfp4_moe_bf16_mxfp4_few_sm90_kernel(Product p) {
#if MXMOE_HOPPER
  unsigned char* tile = ptx::dynamic_shared();
  int32_t* list = reinterpret_cast<int32_t*>(tile + size_t{kRoundSteps} * kPairs * kStep * sizeof(bf16));
  // The second product follows the first, which has waited for what wrote the ids: its weights need not wait.
  bool waited = kGateUp;
  if (kGateUp) wait_and_release();
  const BlockPairs work = pairs_of_block(p.groups, list);
  const int row0 = static_cast<int>(blockIdx.x) * kGroupRows;
  const WeightLane rows = weight_lane(p, work.expert, row0 + static_cast<int>(threadIdx.x) / kWarp % 4 * 16);
  for (int first = 0; first < work.count; first += kPairs) {
    StepCodes ahead[kAhead];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) ahead[s] = load_step(rows, step_of(0, s));
    if (!waited) wait_and_release();
    waited = true;
    if (first == 0) __syncthreads();  // the list is there
    few_tile<kPairs, kGateUp, X>(p, rows, work.expert, work.pairs + first, min(kPairs, work.count - first), ahead,
                                 tile);
  }
  if (!kGateUp) {
    if (!waited) wait_and_release();
    combine_last(p.combine, p.groups, row0, row0 + kGroupRows, list + kFewPairs);
  }
#endif
}

}  // namespace moe
}  // namespace cuda
}  // namespace mxmoe
