#include "core/check.h"
#include "ops/expert_routing/expert_routing.h"

namespace mxmoe {

void check_expert_routing(const Tensor& router_logits, const Tensor& topk_ids, const Tensor& topk_weights) {
  check_dtype("router_logits", router_logits, {DType::f32});
  check_dtype("topk_ids", topk_ids, {DType::i32});
  check_dtype("topk_weights", topk_weights, {DType::f32});
  check_shape("router_logits", router_logits, {-1, -1}, "(num_tokens, num_experts)");
  const int64_t num_tokens = router_logits.shape[0], num_experts = router_logits.shape[1];
  check_shape("topk_ids", topk_ids, {num_tokens, -1}, "(num_tokens, experts_per_token)");
  const int64_t k = topk_ids.shape[1];
  check_shape("topk_weights", topk_weights, {num_tokens, k}, "(num_tokens, experts_per_token)");
  check_value(num_experts <= kMaxExperts, "router_logits has ", num_experts, " experts; wanted at most ",
              kMaxExperts);
  check_value(k >= 1 && k <= num_experts, "experts_per_token is ", k, "; wanted 1 to num_experts = ", num_experts);
  check_contiguous("topk_ids", topk_ids);
  check_contiguous("topk_weights", topk_weights);
  check_no_overlap("topk_ids", topk_ids, "router_logits", router_logits);
  check_no_overlap("topk_weights", topk_weights, "router_logits", router_logits);
  check_no_overlap("topk_weights", topk_weights, "topk_ids", topk_ids);
}

}  // namespace mxmoe
