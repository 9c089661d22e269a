#include "ops/expert_routing/expert_routing.h"

#include <cmath>

#include "core/check.h"
#include "cuda/launch.h"
#include "ops/rmsnorm/rmsnorm_row.cuh"

namespace mxmoe {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

// Larger keys are chosen first: by logit, equal logits (of either sign of zero) by lower index, NaN last. No two
// experts have the same key, and none has key 0.
__device__ __forceinline__ unsigned long long choice_key(float logit, int expert) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  const uint32_t ordered = isnan(logit) ? 0u : (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}

__device__ __forceinline__ unsigned long long warp_max_key(unsigned long long key) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, key, step);
    key = other > key ? other : key;
  }
  return key;
}

// One warp, one token.
__device__ void choose_experts(const float* logits, int num_experts, int experts_per_token, int32_t* ids,
                               float* weights) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned long long last = ~0ull;
  float top = 0.0f, sum = 0.0f;
  for (int i = 0; i < experts_per_token; ++i) {
    unsigned long long best = 0;
    for (int e = lane; e < num_experts; e += kWarp) {
      const unsigned long long key = choice_key(logits[e], e);
      if (key < last && key > best) best = key;
    }
    last = warp_max_key(best);
    const int expert = static_cast<int>(0xffffffffu - static_cast<uint32_t>(last));
    const float logit = logits[expert];
    if (i == 0) top = logit;
    const float power = expf(logit - top);
    sum = __fadd_rn(sum, power);
    if (lane == 0) ids[i] = expert, weights[i] = power;
  }
  if (lane == 0) {
    for (int i = 0; i < experts_per_token; ++i) weights[i] /= sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    expert_routing_sm80_kernel(const float* logits, int64_t logits_stride, int64_t num_tokens, int num_experts,
                               int experts_per_token, int32_t* ids, float* weights) {
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  ptx::release_next_kernel();
  if (token >= num_tokens) return;
  ptx::wait_for_previous_kernel();
  choose_experts(logits + token * logits_stride, num_experts, experts_per_token, ids + token * experts_per_token,
                 weights + token * experts_per_token);
}

// How many tokens a block takes: their rows are what its shared memory holds, and each weight is read once for all.
constexpr int kTokens = 2;
constexpr int kMaxHidden = 8192;
constexpr int kMaxFusedExperts = 1024;

struct NormRouting {
  const void* x;
  int64_t x_stride;
  const bf16* norm_weight;
  float eps;
  const bf16* router_weight;
  int64_t router_stride;
  const bf16* router_bias;
  void* h;
  int64_t h_stride;
  float* logits;
  int32_t* ids;
  float* weights;
  unsigned* arrived;  // a counter for each group of tokens
  int64_t num_tokens;
  int hidden_size, num_experts, experts_per_token;
};

// The normalised row to `row` (shared, zeros to a multiple of 4) and, from one block, to h.
template <typename X, typename H>
__device__ void normalise(const NormRouting& r, int64_t token, bool write, float* row, float* partial) {
  static_assert(kWarps == norm::kParts, "a warp a part");
  const X* x = static_cast<const X*>(r.x) + token * r.x_stride;
  H* h = static_cast<H*>(r.h) + token * r.h_stride;
  const int64_t n = r.hidden_size;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const bool x_aligned = aligned_to(x, 4 * sizeof(X)), h_aligned = aligned_to(h, 4 * sizeof(H));
  const bool w_aligned = aligned_to(r.norm_weight, 8);
  const float part = norm::part_of_squares(x, n, x_aligned, warp);
  if (threadIdx.x % kWarp == 0) partial[warp] = part;
  __syncthreads();
  const float inverse = norm::inverse_of(partial, n, r.eps);
  for (int64_t i = 4 * int64_t{threadIdx.x}; i < n; i += 4 * kThreads) {
    const float4 y = norm::scaled(load4(x, i, n, x_aligned), inverse, load4(r.norm_weight, i, n, w_aligned));
    *reinterpret_cast<float4*>(row + i) = y;
    if (write) store4(h, i, n, h_aligned, y);
  }
}

// The first values of an expert's weights, for a lane: asked for before anything is known of x. 24 steps of 128
// hold a row of 3072.
constexpr int kHeldSteps = 24;
struct Held {
  uint2 values[kHeldSteps];
};
__device__ __forceinline__ void hold(Held& held, const bf16* weight, int n) {
#pragma unroll
  for (int j = 0; j < kHeldSteps; ++j) {
    const int i = 4 * (j * kWarp + static_cast<int>(threadIdx.x) % kWarp);
    held.values[j] = i + 4 <= n ? *reinterpret_cast<const uint2*>(weight + i) : make_uint2(0, 0);
  }
}

// An expert's logits for the block's tokens, as linear_f32_bf16_sm80_kernel adds them up.
__device__ __forceinline__ void score(const NormRouting& r, const bf16* weight, bool aligned, const Held& held,
                                      const float* rows, int padded, int tokens, float (&sums)[kTokens]) {
  const auto add = [&](int i, float4 w) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < tokens) sums[t] = add_products(sums[t], *reinterpret_cast<const float4*>(rows + t * padded + i), w);
    }
  };
  int i = 4 * (static_cast<int>(threadIdx.x) % kWarp);
  if (aligned) {
#pragma unroll
    for (int j = 0; j < kHeldSteps; ++j) {
      const uint2 v = held.values[j];
      if (i + 4 <= r.hidden_size) {
        add(i, make_float4(widen_low(v.x), widen_high(v.x), widen_low(v.y), widen_high(v.y)));
        i += 4 * kWarp;
      }
    }
  }
  for (; i < r.hidden_size; i += 4 * kWarp) add(i, load4(weight, i, r.hidden_size, aligned));
}

// Blocks (group of tokens, group of experts), a warp an expert. The block that comes last for its tokens has all
// their logits and chooses.
template <typename X, typename H>
__global__ void __launch_bounds__(kThreads) rmsnorm_routing_sm80_kernel(NormRouting r) {
  const int padded = (r.hidden_size + 3) / 4 * 4;
  float* rows = reinterpret_cast<float*>(ptx::dynamic_shared());
  float* own_logits = rows + kTokens * padded;
  float* partial = own_logits + kTokens * r.num_experts;  // one set for each token: see block_sum
  int* last = reinterpret_cast<int*>(partial + kTokens * kWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first = int64_t{blockIdx.x} * kTokens;
  const int tokens = static_cast<int>(min(int64_t{kTokens}, r.num_tokens - first));
  const int expert = static_cast<int>(blockIdx.y) * kWarps + warp;
  const bf16* weight = r.router_weight + min(expert, r.num_experts - 1) * r.router_stride;
  const bool aligned = aligned_to(weight, 8);
  Held held;
  if (aligned) hold(held, weight, r.hidden_size);
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();

  for (int t = 0; t < tokens; ++t) {
    normalise<X, H>(r, first + t, blockIdx.y == 0, rows + t * padded, partial + t * kWarps);
  }
  __syncthreads();
  if (expert < r.num_experts) {
    float sums[kTokens] = {};
    score(r, weight, aligned, held, rows, padded, tokens, sums);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= tokens) continue;
      const float logit = __fadd_rn(warp_sum(sums[t]), widen(r.router_bias[expert]));
      if (lane == 0) r.logits[(first + t) * r.num_experts + expert] = logit;
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = atomicAdd(&r.arrived[blockIdx.x], 1u) == gridDim.y - 1;
    if (*last) r.arrived[blockIdx.x] = 0;  // as the next launch wants it
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  for (int i = static_cast<int>(threadIdx.x); i < tokens * r.num_experts; i += kThreads) {
    own_logits[i] = __ldcg(&r.logits[first * r.num_experts + i]);
  }
  __syncthreads();
  if (warp < tokens) {
    choose_experts(own_logits + warp * r.num_experts, r.num_experts, r.experts_per_token,
                   r.ids + (first + warp) * r.experts_per_token, r.weights + (first + warp) * r.experts_per_token);
  }
}

void check_router(const Tensor& x, const NormRouter& router, const Tensor& h, const Tensor& logits) {
  check_dtype("x", x, {DType::f32, DType::bf16});
  check_dtype("h", h, {DType::f32, DType::bf16});
  for (const NamedTensor& t :
       {NamedTensor{"norm_weight", router.norm_weight}, NamedTensor{"router_weight", router.router_weight},
        NamedTensor{"router_bias", router.router_bias}}) {
    check_dtype(t.name, t.tensor, {DType::bf16});
  }
  check_shape("x", x, {-1, -1}, "(num_tokens, hidden_size)");
  const int64_t num_tokens = x.shape[0], hidden_size = x.shape[1];
  check_value(hidden_size >= 1 && hidden_size <= kMaxHidden, "x has hidden_size ", hidden_size, "; wanted 1 to ",
              kMaxHidden);
  check_shape("norm_weight", router.norm_weight, {hidden_size}, "(hidden_size,)");
  check_shape("router_weight", router.router_weight, {-1, hidden_size}, "(num_experts, hidden_size)");
  const int64_t num_experts = router.router_weight.shape[0];
  check_value(num_experts <= kMaxFusedExperts, "router_weight has ", num_experts, " experts; wanted at most ",
              kMaxFusedExperts);
  check_shape("router_bias", router.router_bias, {num_experts}, "(num_experts,)");
  check_shape("h", h, {num_tokens, hidden_size}, "(num_tokens, hidden_size)");
  check_shape("logits", logits, {num_tokens, num_experts}, "(num_tokens, num_experts)");
  check_contiguous("logits", logits);
  check_value(std::isfinite(router.eps) && router.eps >= 0.0f, "eps is ", router.eps,
              "; wanted a finite number, 0 or more");
}

void check_apart(const Tensor& x, const NormRouter& router, const Tensor& h, const Tensor& logits, const Tensor& ids,
                 const Tensor& weights) {
  for (const NamedTensor& t : {NamedTensor{"h", h}, NamedTensor{"logits", logits}, NamedTensor{"topk_ids", ids},
                               NamedTensor{"topk_weights", weights}}) {
    check_no_overlap(t.name, t.tensor,
                     {{"x", x},
                      {"norm_weight", router.norm_weight},
                      {"router_weight", router.router_weight},
                      {"router_bias", router.router_bias}});
  }
  check_no_overlap("h", h, {{"logits", logits}, {"topk_ids", ids}, {"topk_weights", weights}});
}

}  // namespace

void expert_routing(Stream& stream, const Tensor& router_logits, const Tensor& topk_ids, const Tensor& topk_weights) {
  check_expert_routing(router_logits, topk_ids, topk_weights);
  record_kernel("expert_routing", "expert_routing_sm80_kernel");
  launch(expert_routing_sm80_kernel, grid_size(ceil_div(router_logits.shape[0], kWarps)), kThreads, 0, stream,
         Order::Dependent, router_logits.as<float>(), router_logits.stride[0], router_logits.shape[0],
         static_cast<int>(router_logits.shape[1]), static_cast<int>(topk_ids.shape[1]), topk_ids.as<int32_t>(),
         topk_weights.as<float>());
}

void rmsnorm_routing(Stream& stream, const Tensor& x, const NormRouter& router, const Tensor& h, const Tensor& logits,
                     const Tensor& topk_ids, const Tensor& topk_weights) {
  check_router(x, router, h, logits);
  check_expert_routing(logits, topk_ids, topk_weights);
  check_apart(x, router, h, logits, topk_ids, topk_weights);
  const int64_t num_tokens = x.shape[0], groups = ceil_div(num_tokens, kTokens);
  NormRouting r{};
  r.x = x.data, r.x_stride = x.stride[0];
  r.norm_weight = router.norm_weight.as<bf16>(), r.eps = router.eps;
  r.router_weight = router.router_weight.as<bf16>(), r.router_stride = router.router_weight.stride[0];
  r.router_bias = router.router_bias.as<bf16>();
  r.h = h.data, r.h_stride = h.stride[0];
  r.logits = logits.as<float>(), r.ids = topk_ids.as<int32_t>(), r.weights = topk_weights.as<float>();
  r.arrived = stream.counters(static_cast<size_t>(groups));
  r.num_tokens = num_tokens, r.hidden_size = static_cast<int>(x.shape[1]);
  r.num_experts = static_cast<int>(logits.shape[1]), r.experts_per_token = static_cast<int>(topk_ids.shape[1]);
  const auto padded = static_cast<size_t>((r.hidden_size + 3) / 4 * 4);
  const size_t shared =
      (kTokens * (padded + static_cast<size_t>(r.num_experts)) + kTokens * kWarps + 1) * sizeof(float);
  const dim3 grid(grid_size(groups), grid_depth(ceil_div(r.num_experts, kWarps)));
  record_kernel("rmsnorm_routing", "rmsnorm_routing_sm80_kernel");
  const bool h_f32 = h.dtype == DType::f32;
  if (x.dtype == DType::f32) {
    launch(h_f32 ? rmsnorm_routing_sm80_kernel<float, float> : rmsnorm_routing_sm80_kernel<float, bf16>, grid,
           kThreads, shared, stream, Order::Dependent, r);
  } else {
    launch(h_f32 ? rmsnorm_routing_sm80_kernel<bf16, float> : rmsnorm_routing_sm80_kernel<bf16, bf16>, grid, kThreads,
           shared, stream, Order::Dependent, r);
  }
}

}  // namespace cuda
}  // namespace mxmoe
