// What becomes of sums that lie in registers as tensor cores leave them: lane (g, t) of a warp holds rows `row` and
// row + 8, `row` being its first row and g, of pairs 8 j + 2t and the next: sums[4 j + c] and sums[4 j + 2 + c].
#pragma once

#include "ops/mxfp4_moe/mxfp4_moe_product.cuh"

namespace mxmoe {
namespace cuda {
namespace moe {

// Lanes g and g ^ 1 exchange, so that each has gate and up of one output. Calls visit(j, output, y): y of pairs
// 8 j + 2t and the next. All lanes call it together.
template <int kPairs, typename Visit>
__device__ __forceinline__ void activate(const Product& p, int expert, int row, const float (&sums)[kPairs / 2],
                                         const Visit& visit) {
  const bool odd = static_cast<int>(threadIdx.x) % kWarp / 4 % 2 != 0;
  const int gate_row = odd ? row + 7 : row;
  const bool inside = gate_row < p.rows;
  const int64_t bias_row = int64_t{expert} * p.rows + gate_row;
  const float gate_bias = inside ? bias_of(p, bias_row) : 0.0f, up_bias = inside ? bias_of(p, bias_row + 1) : 0.0f;
#pragma unroll
  for (int j = 0; j < kPairs / 8; ++j) {
    float y[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float low = sums[4 * j + c], high = sums[4 * j + 2 + c];
      const float other = __shfl_xor_sync(kAllLanes, odd ? low : high, 4);
      const float gate = (odd ? other : low) + gate_bias, up = (odd ? high : other) + up_bias;
      y[c] = swiglu(gate, up, p.alpha, p.limit);
    }
    visit(j, gate_row / 2, y);
  }
}

template <int kPairs>
__device__ __forceinline__ void write_rows(const Product& p, int expert, int row, const int32_t* list, int pairs,
                                           const float (&sums)[kPairs / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + 8 * half;
    if (own >= p.rows) continue;
    const float bias = bias_of(p, int64_t{expert} * p.rows + own);
#pragma unroll
    for (int i = 0; i < kPairs / 4; ++i) {
      const int n = i / 2 * 8 + 2 * (lane % 4) + i % 2;
      if (n < pairs) {
        static_cast<float*>(p.y)[int64_t{list[n]} * p.rows + own] = sums[i / 2 * 4 + 2 * half + i % 2] + bias;
      }
    }
  }
}

// Rows of activations as bfloat16, for kernels that copy them by 16 bytes. grid: (token, eights of values).
constexpr int kRoundThreads = 128;
template <typename X>
__global__ void __launch_bounds__(kRoundThreads)
    mxfp4_moe_round_sm80_kernel(const X* x, int64_t x_stride, int k, uint4* y) {
  const int eight = static_cast<int>(blockIdx.y) * kRoundThreads + static_cast<int>(threadIdx.x);
  if (8 * eight >= k) return;
  const bool aligned = linear_mma::rows_aligned(x, x_stride);
  ptx::wait_for_previous_kernel();
  ptx::release_next_kernel();
  const int64_t token = blockIdx.x;
  y[token * (k / 8) + eight] = linear_mma::load8(x + token * x_stride, 8 * eight, k, aligned);
}

}  // namespace moe
}  // namespace cuda
}  // namespace mxmoe
