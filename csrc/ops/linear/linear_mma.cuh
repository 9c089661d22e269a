// What both tensor-core kernels of linear share: how K is laid over the instruction, and in which order sums are
// formed. The instruction multiplies 16 weight rows by 8 tokens over 16 values of K. It does not matter which value
// of K stands where, as long as both operands agree; so lane (g, t), g = lane / 4, t = lane % 4, takes the 8
// neighbours k0 + 8t .. of rows g and g + 8 in one access of 16 bytes, and feeds two instructions from them.
#pragma once

#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {
namespace linear_mma {

constexpr int kStep = 32;        // of K: two instructions
constexpr int kSliceSteps = 12;  // a slice's products are summed from zero, then slices in order
constexpr int kSlice = kStep * kSliceSteps;
constexpr int kTileRows = 16;  // weight rows of an instruction
constexpr int kTileTokens = 8;

// What ends an output element: y = (sum + bias) + residual.
struct Epilogue {
  const float* bias_f32;
  const bf16* bias_bf16;
  const float* residual;
  int64_t residual_stride;
  float* y;
  int64_t y_stride;
};

__device__ __forceinline__ void finish(const Epilogue& e, int64_t token, int64_t row, float sum) {
  if (e.bias_f32 != nullptr) sum += e.bias_f32[row];
  if (e.bias_bf16 != nullptr) sum += widen(e.bias_bf16[row]);
  if (e.residual != nullptr) sum += e.residual[token * e.residual_stride + row];
  e.y[token * e.y_stride + row] = sum;
}

// Eight neighbours as bfloat16, zeros past the end of the row. Not past the caches: another kernel may have written
// them a moment ago.
__device__ __forceinline__ uint4 load8(const bf16* row, int64_t k, int64_t n, bool aligned) {
  if (aligned && k + 8 <= n) return *reinterpret_cast<const uint4*>(row + k);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = k + 2 * i < n ? row[k + 2 * i].bits : 0u;
    const uint32_t high = k + 2 * i + 1 < n ? row[k + 2 * i + 1].bits : 0u;
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ uint4 load8(const float* row, int64_t k, int64_t n, bool aligned) {
  const float4 a = load4(row, k, n, aligned), b = load4(row, k + 4, n, aligned);
  return make_uint4(ptx::pack_bf16(a.x, a.y), ptx::pack_bf16(a.z, a.w), ptx::pack_bf16(b.x, b.y),
                    ptx::pack_bf16(b.z, b.w));
}
template <typename X>
__device__ __forceinline__ bool rows_aligned(const X* base, int64_t stride) {
  return aligned_to(base, 16) && stride * static_cast<int64_t>(sizeof(X)) % 16 == 0;
}

// One step of K of one tile: rows g and g + 8 of the weight, token g of x.
__device__ __forceinline__ void multiply(float (&acc)[4], uint4 low_rows, uint4 high_rows, uint4 x) {
  const uint32_t first[4] = {low_rows.x, high_rows.x, low_rows.y, high_rows.y};
  const uint32_t second[4] = {low_rows.z, high_rows.z, low_rows.w, high_rows.w};
  ptx::mma_bf16_m16n8k16(acc, first, x.x, x.y);
  ptx::mma_bf16_m16n8k16(acc, second, x.z, x.w);
}

}  // namespace linear_mma
}  // namespace cuda
}  // namespace mxmoe
