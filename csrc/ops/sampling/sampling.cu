#include "ops/sampling/sampling.h"

#include <algorithm>

#include "core/check.h"
#include "cuda/launch.h"
#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kPartValues = 4096;  // of one block; 201 088 make 50 blocks

struct Part {
  unsigned long long best;  // see order_key
  float sum;                // of exp(logit - best logit)
};

struct Greedy {
  const float* logits;
  int64_t stride;
  int vocab_size, parts;
  Part* partial;      // [token][part]
  unsigned* arrived;  // a counter for each token
  int64_t* token_ids;
  float* logprobs;
};

// Larger logits have larger keys, then lower indices; NaN has the largest.
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

__device__ unsigned long long block_max_key(unsigned long long key, unsigned long long* shared) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, key, step);
    key = other > key ? other : key;
  }
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = key;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) key = shared[w] > key ? shared[w] : key;
  return key;
}

// One thread, once the last part of its token is there: parts in order.
__device__ void finish(const Greedy& r, int64_t token) {
  const Part* parts = r.partial + token * r.parts;
  unsigned long long best = 0;
  for (int i = 0; i < r.parts; ++i) {
    const unsigned long long key = __ldcg(&parts[i].best);
    best = key > best ? key : best;
  }
  const float top = logit_of(best);
  float sum = 0.0f;
  for (int i = 0; i < r.parts; ++i) {
    const float own = logit_of(__ldcg(&parts[i].best));
    sum += own == minus_infinity() ? 0.0f : __ldcg(&parts[i].sum) * expf(own - top);
  }
  r.token_ids[token] = index_of(best);
  r.logprobs[token] = isinf(top) ? quiet_nan() : -logf(sum);
}

// grid: (part of the vocabulary, token).
__global__ void __launch_bounds__(kThreads) greedy_sample_sm80_kernel(Greedy r) {
  auto* keys = reinterpret_cast<unsigned long long*>(ptx::dynamic_shared());
  float* sums = reinterpret_cast<float*>(keys + kWarps);
  const int64_t token = blockIdx.y;
  const int begin = static_cast<int>(blockIdx.x * kPartValues);
  const int end = static_cast<int>(min(int64_t{r.vocab_size}, begin + kPartValues));
  const float* logits = r.logits + token * r.stride;
  ptx::wait_for_previous_kernel();

  unsigned long long best = 0;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const unsigned long long key = order_key(logits[i], i);
    best = key > best ? key : best;
  }
  best = block_max_key(best, keys);
  const float top = logit_of(best);
  float sum = 0.0f;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) sum += expf(logits[i] - top);
  sum = block_sum<kThreads>(sum, sums);
  if (threadIdx.x != 0) return;
  r.partial[token * r.parts + blockIdx.x] = {best, sum};
  __threadfence();
  if (atomicAdd(&r.arrived[token], 1u) != gridDim.x - 1) return;
  r.arrived[token] = 0;  // as the next launch wants it
  __threadfence();
  finish(r, token);
}

}  // namespace

void greedy_sample(Stream& stream, const Tensor& logits, const Tensor& token_ids, const Tensor& logprobs) {
  check_dtype("logits", logits, {DType::f32});
  check_dtype("token_ids", token_ids, {DType::i64});
  check_dtype("logprobs", logprobs, {DType::f32});
  check_shape("logits", logits, {-1, -1}, "(num_tokens, vocab_size)");
  check_shape("token_ids", token_ids, {logits.shape[0]}, "(num_tokens,)");
  check_shape("logprobs", logprobs, {logits.shape[0]}, "(num_tokens,)");
  check_value(logits.shape[1] >= 1 && logits.shape[1] <= INT32_MAX, "logits has vocab_size ", logits.shape[1],
              "; wanted 1 to ", INT32_MAX);
  check_no_overlap("token_ids", token_ids, {{"logits", logits}, {"logprobs", logprobs}});
  check_no_overlap("logprobs", logprobs, "logits", logits);
  const int64_t num_tokens = logits.shape[0], parts = ceil_div(logits.shape[1], kPartValues);
  if (num_tokens == 0) return;
  Greedy r{};
  r.logits = logits.as<float>(), r.stride = logits.stride[0];
  r.vocab_size = static_cast<int>(logits.shape[1]), r.parts = static_cast<int>(parts);
  r.partial = static_cast<Part*>(
      stream.workspace(static_cast<size_t>(num_tokens * parts) * sizeof(Part), "greedy_sample's partial results"));
  r.arrived = stream.counters(static_cast<size_t>(num_tokens));
  r.token_ids = token_ids.as<int64_t>(), r.logprobs = logprobs.as<float>();
  record_kernel("greedy_sample", "greedy_sample_sm80_kernel");
  launch(greedy_sample_sm80_kernel, dim3(grid_size(parts), grid_depth(num_tokens)), kThreads,
         kWarps * (sizeof(unsigned long long) + sizeof(float)), stream, r);
}

}  // namespace cuda
}  // namespace mxmoe
