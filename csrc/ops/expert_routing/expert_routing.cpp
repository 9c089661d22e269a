#include "ops/expert_routing/expert_routing.h"

#include "core/check.h"
#include "core/isa.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {
Dispatch<RoutingKernel> table("expert_routing", {MXMOE_X86({"expert_routing_avx512", kAvx512, expert_routing_avx512},
                                                           {"expert_routing_avx2", kAvx2, expert_routing_avx2}){
                                                    "expert_routing_scalar", 0, expert_routing_scalar}});
}  // namespace

void expert_routing(const Tensor& router_logits, const Tensor& topk_ids, const Tensor& topk_weights) {
  check_expert_routing(router_logits, topk_ids, topk_weights);
  const int64_t num_tokens = router_logits.shape[0], num_experts = router_logits.shape[1], k = topk_ids.shape[1];
  const RoutingKernel kernel = table.pick();
  parallel_for(num_tokens, [&](int64_t t) {
    kernel({router_logits.as<float>() + t * router_logits.stride[0], num_experts, topk_ids.as<int32_t>() + t * k,
            topk_weights.as<float>() + t * k, k});
  });
}

void sort_by_expert(const int32_t* ids, int64_t num_pairs, int64_t first_expert, int64_t num_experts,
                    int32_t* offsets, int32_t* order) {
  for (int64_t e = 0; e <= num_experts; ++e) offsets[e] = 0;
  const auto held = [&](int64_t pair) { return ids[pair] >= first_expert && ids[pair] < first_expert + num_experts; };
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    if (held(pair)) ++offsets[ids[pair] - first_expert + 1];
  }
  for (int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];
  for (int64_t i = offsets[num_experts]; i < num_pairs; ++i) order[i] = -1;
  // offsets[e] serves as expert e's cursor and ends at the start of e + 1: shift back by one afterwards.
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    if (held(pair)) order[offsets[ids[pair] - first_expert]++] = static_cast<int32_t>(pair);
  }
  for (int64_t e = num_experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

void expert_offsets(const Tensor& topk_ids, int64_t num_experts, const Tensor& offsets, const Tensor& order) {
  check_dtype("topk_ids", topk_ids, {DType::i32});
  check_dtype("expert_offsets", offsets, {DType::i32});
  check_dtype("order", order, {DType::i32});
  check_shape("topk_ids", topk_ids, {-1, -1}, "(num_tokens, experts_per_token)");
  check_contiguous("topk_ids", topk_ids);
  check_value(num_experts >= 1 && num_experts <= kMaxExperts, "num_experts is ", num_experts, "; wanted 1 to ",
              kMaxExperts);
  const int64_t num_pairs = topk_ids.size();
  check_value(num_pairs <= INT32_MAX, "topk_ids holds ", num_pairs, " pairs; wanted at most ", INT32_MAX);
  check_shape("expert_offsets", offsets, {num_experts + 1}, "(num_experts + 1,)");
  check_shape("order", order, {num_pairs}, "(num_tokens * experts_per_token,)");
  check_no_overlap("expert_offsets", offsets, {{"topk_ids", topk_ids}, {"order", order}});
  check_no_overlap("order", order, "topk_ids", topk_ids);
  const int32_t* ids = topk_ids.as<int32_t>();
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    check_value(ids[pair] >= 0 && ids[pair] < num_experts, "topk_ids holds expert ", ids[pair], "; wanted 0 to ",
                num_experts - 1);
  }
  sort_by_expert(ids, num_pairs, 0, num_experts, offsets.as<int32_t>(), order.as<int32_t>());
}

}  // namespace mxmoe
