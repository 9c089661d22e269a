// What the kernels of sampling share: the order of a row's logits, and where results go.
#pragma once

#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {
namespace sampling {

// Larger logits have larger keys, then lower indices; NaN has the largest. No index has key 0.
__device__ __forceinline__ unsigned long long order_key(float logit, int index) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  const uint32_t ordered = isnan(logit) ? 0xffffffffu : (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
__device__ __forceinline__ int index_of(unsigned long long key) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}
// The logit that belongs to a key, NaN or not.
__device__ __forceinline__ float logit_of(unsigned long long key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  if (ordered == 0xffffffffu) return quiet_nan();
  return __uint_as_float((ordered & 0x80000000u) != 0 ? ordered & 0x7fffffffu : ~ordered);
}

// Where a step's results go a second time: rows of two, by whether a token's position is even.
struct Copies {
  const int64_t* positions;  // or null: none wanted
  int64_t* token_ids;        // [2][token]
  float* logprobs;
  int64_t num_tokens;
};
__device__ __forceinline__ int64_t copy_place(const Copies& c, int64_t token) {
  return (c.positions[token] & 1) * c.num_tokens + token;
}
__device__ __forceinline__ void put_copy(const Copies& c, int64_t token, int64_t id, float logprob) {
  if (c.positions == nullptr) return;
  c.token_ids[copy_place(c, token)] = id, c.logprobs[copy_place(c, token)] = logprob;
}

}  // namespace sampling
}  // namespace cuda
}  // namespace mxmoe
