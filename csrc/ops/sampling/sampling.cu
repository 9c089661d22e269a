#include "ops/sampling/sampling.h"

#include <algorithm>

#include "core/check.h"
#include "cuda/launch.h"
#include "ops/sampling/sampling_draw.cuh"

namespace mxmoe {
namespace cuda {
namespace {

using sampling::Copies;
using sampling::index_of;
using sampling::logit_of;
using sampling::order_key;
using sampling::put_copy;

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
  Copies copies;
};

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

// One warp, once the last part of its token is there. A lane takes every 32nd part in order, then one tree adds up.
__device__ void finish(const Greedy& r, int64_t token) {
  const Part* parts = r.partial + token * r.parts;
  const int lane = static_cast<int>(threadIdx.x);
  unsigned long long best = 0;
  for (int i = lane; i < r.parts; i += kWarp) {
    const unsigned long long key = __ldcg(&parts[i].best);
    best = key > best ? key : best;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, best, step);
    best = other > best ? other : best;
  }
  const float top = logit_of(best);
  float sum = 0.0f;
  for (int i = lane; i < r.parts; i += kWarp) {
    const float own = logit_of(__ldcg(&parts[i].best));
    sum += own == minus_infinity() ? 0.0f : __ldcg(&parts[i].sum) * expf(own - top);
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  const float logprob = isinf(top) ? quiet_nan() : -logf(sum);
  r.token_ids[token] = index_of(best), r.logprobs[token] = logprob;
  put_copy(r.copies, token, index_of(best), logprob);
}

// grid: (part of the vocabulary, token).
__global__ void __launch_bounds__(kThreads) greedy_sample_sm80_kernel(Greedy r) {
  auto* keys = reinterpret_cast<unsigned long long*>(ptx::dynamic_shared());
  float* sums = reinterpret_cast<float*>(keys + kWarps);
  const int64_t token = blockIdx.y;
  const int begin = static_cast<int>(blockIdx.x * kPartValues);
  const int end = static_cast<int>(min(int64_t{r.vocab_size}, begin + kPartValues));
  const float* logits = r.logits + token * r.stride;
  ptx::release_next_kernel();
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
  if (threadIdx.x >= kWarp) return;
  unsigned before = 0;
  if (threadIdx.x == 0) {
    r.partial[token * r.parts + blockIdx.x] = {best, sum};
    __threadfence();
    before = atomicAdd(&r.arrived[token], 1u);
    if (before == gridDim.x - 1) r.arrived[token] = 0;  // as the next launch wants it
    __threadfence();
  }
  if (__shfl_sync(kAllLanes, before, 0) != gridDim.x - 1) return;
  finish(r, token);
}

void check_copies(const SampleCopies& c, int64_t num_tokens, std::initializer_list<NamedTensor> others) {
  if (!c.positions) return;
  check_dtype("positions", c.positions, {DType::i64});
  check_dtype("token_id_copies", c.token_ids, {DType::i64});
  check_dtype("logprob_copies", c.logprobs, {DType::f32});
  check_shape("positions", c.positions, {num_tokens}, "(num_tokens,)");
  check_shape("token_id_copies", c.token_ids, {2, num_tokens}, "(2, num_tokens)");
  check_shape("logprob_copies", c.logprobs, {2, num_tokens}, "(2, num_tokens)");
  for (const NamedTensor& t :
       {NamedTensor{"token_id_copies", c.token_ids}, NamedTensor{"logprob_copies", c.logprobs}}) {
    check_contiguous(t.name, t.tensor);
    check_no_overlap(t.name, t.tensor, "positions", c.positions);
    check_no_overlap(t.name, t.tensor, others);
  }
  check_no_overlap("token_id_copies", c.token_ids, "logprob_copies", c.logprobs);
}

void check_of_tokens(const char* name, const Tensor& t, DType dtype, int64_t num_tokens) {
  check_dtype(name, t, {dtype});
  check_shape(name, t, {num_tokens}, "(num_tokens,)");
  check_contiguous(name, t);
}

void check_params(const SampleParams& p, int64_t num_tokens) {
  check_of_tokens("temperature", p.temperature, DType::f64, num_tokens);
  check_of_tokens("top_p", p.top_p, DType::f64, num_tokens);
  check_of_tokens("min_p", p.min_p, DType::f64, num_tokens);
  check_of_tokens("top_k", p.top_k, DType::i64, num_tokens);
  check_of_tokens("positions", p.positions, DType::i64, num_tokens);
  check_dtype("uniforms", p.uniforms, {DType::f64});
  check_shape("uniforms", p.uniforms, {2, num_tokens}, "(2, num_tokens)");
  check_contiguous("uniforms", p.uniforms);
}

Copies copies_of(const SampleCopies& c, int64_t num_tokens) {
  if (!c.positions) return {};
  return {c.positions.as<int64_t>(), c.token_ids.as<int64_t>(), c.logprobs.as<float>(), num_tokens};
}

}  // namespace

void greedy_sample(Stream& stream, const Tensor& logits, const Tensor& token_ids, const Tensor& logprobs,
                   const SampleCopies& copies) {
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
  check_copies(copies, logits.shape[0], {{"logits", logits}, {"token_ids", token_ids}, {"logprobs", logprobs}});
  const int64_t num_tokens = logits.shape[0], parts = ceil_div(logits.shape[1], kPartValues);
  if (num_tokens == 0) return;
  Greedy r{};
  r.logits = logits.as<float>(), r.stride = logits.stride[0];
  r.vocab_size = static_cast<int>(logits.shape[1]), r.parts = static_cast<int>(parts);
  r.partial = static_cast<Part*>(
      stream.workspace(static_cast<size_t>(num_tokens * parts) * sizeof(Part), "greedy_sample's partial results"));
  r.arrived = stream.counters(static_cast<size_t>(num_tokens));
  r.token_ids = token_ids.as<int64_t>(), r.logprobs = logprobs.as<float>();
  r.copies = copies_of(copies, num_tokens);
  record_kernel("greedy_sample", "greedy_sample_sm80_kernel");
  launch(greedy_sample_sm80_kernel, dim3(grid_size(parts), grid_depth(num_tokens)), kThreads,
         kWarps * (sizeof(unsigned long long) + sizeof(float)), stream, Order::Dependent, r);
}

void sample(Stream& stream, const Tensor& logits, const SampleParams& params, const Tensor& token_ids,
            const Tensor& logprobs, const SampleCopies& copies) {
  check_shape("logits", logits, {-1, -1}, "(num_tokens, vocab_size)");
  const int64_t num_tokens = logits.shape[0];
  check_params(params, num_tokens);
  for (const NamedTensor& t : {NamedTensor{"token_ids", token_ids}, NamedTensor{"logprobs", logprobs}}) {
    check_no_overlap(t.name, t.tensor,
                     {{"temperature", params.temperature},
                      {"top_p", params.top_p},
                      {"top_k", params.top_k},
                      {"min_p", params.min_p},
                      {"uniforms", params.uniforms},
                      {"positions", params.positions}});
  }
  check_copies(copies, num_tokens, {{"logits", logits}, {"token_ids", token_ids}, {"logprobs", logprobs}});
  greedy_sample(stream, logits, token_ids, logprobs, {});
  if (num_tokens == 0) return;
  sampling::Draw d{};
  d.logits = logits.as<float>(), d.stride = logits.stride[0];
  d.vocab_size = static_cast<int>(logits.shape[1]), d.mass_bits = sampling::kMassBits;
  while (logits.shape[1] > int64_t{1} << (63 - d.mass_bits)) --d.mass_bits;
  d.temperature = params.temperature.as<double>(), d.top_p = params.top_p.as<double>();
  d.min_p = params.min_p.as<double>(), d.top_k = params.top_k.as<int64_t>();
  d.uniforms = params.uniforms.as<double>(), d.positions = params.positions.as<int64_t>();
  d.token_ids = token_ids.as<int64_t>(), d.logprobs = logprobs.as<float>();
  d.copies = copies_of(copies, num_tokens);
  record_kernel("sample", "sample_sm80_kernel");
  launch(sampling::sample_sm80_kernel, grid_size(num_tokens), sampling::kDrawThreads, sizeof(sampling::DrawShared),
         stream, Order::Dependent, d);
}

}  // namespace cuda
}  // namespace mxmoe
