// expert_routing
// Computes: for every token the experts_per_token largest router logits, in descending order, equal logits by
// lower
//           expert index (NaN counts as lowest), and their softmax over those chosen alone. expert_offsets
//           sorts the (token, choice) pairs by expert, stably.
// Shapes:   router_logits (num_tokens, num_experts); topk_ids, topk_weights (num_tokens, experts_per_token);
//           expert_offsets (num_experts + 1); order (num_tokens * experts_per_token), pair = token *
//           experts_per_token + choice; expert e owns order[expert_offsets[e] : expert_offsets[e + 1]].
// Dtypes:   logits and weights float32; ids, offsets and order int32. float32 throughout.
// Layout:   contiguous; router_logits may have a row stride.
// Requires: 1 <= experts_per_token <= num_experts <= 65536; expert_offsets: 0 <= topk_ids < num_experts.
// Calls:    no overlap; tokens are spread over threads; no scratch.
// CUDA:     expert_routing: a warp a token; the same ids and order of additions whatever the batch. rmsnorm_routing:
//           one launch for what stands before the experts: h = rmsnorm(x) (see rmsnorm; written in its dtype), logits
//           = h Wr^T + br in float32 from the unrounded h, and the choice above. x (num_tokens, hidden_size) float32
//           or bfloat16; norm_weight (hidden_size), router_weight (num_experts, hidden_size), router_bias
//           (num_experts) bfloat16; h float32 or bfloat16; logits (num_tokens, num_experts) float32, written. At most
//           1024 experts, hidden_size at most 8192.
// Source:   model card section 2.2; gpt_oss/torch/model.py, MLPBlock.
#pragma once

#include "core/types.h"

namespace mxmoe {

constexpr int64_t kMaxExperts = 65536;

void check_expert_routing(const Tensor& router_logits, const Tensor& topk_ids, const Tensor& topk_weights);
void expert_routing(const Tensor& router_logits, const Tensor& topk_ids, const Tensor& topk_weights);
void expert_offsets(const Tensor& topk_ids, int64_t num_experts, const Tensor& offsets, const Tensor& order);

// The same on raw memory, for ops that route inside and may hold only a range of experts: pairs of other experts are
// left out, and the order's tail is -1.
void sort_by_expert(const int32_t* ids, int64_t num_pairs, int64_t first_expert, int64_t num_experts,
                    int32_t* offsets, int32_t* order);

struct RoutingRow {
  const float* logits;
  int64_t num_experts;
  int32_t* ids;
  float* weights;
  int64_t experts_per_token;
};
using RoutingKernel = void (*)(const RoutingRow&);

void expert_routing_scalar(const RoutingRow&);
void expert_routing_avx2(const RoutingRow&);
void expert_routing_avx512(const RoutingRow&);

namespace cuda {
class Stream;

struct NormRouter {
  Tensor norm_weight;
  float eps;
  Tensor router_weight, router_bias;
};
void expert_routing(Stream& stream, const Tensor& router_logits, const Tensor& topk_ids, const Tensor& topk_weights);
void rmsnorm_routing(Stream& stream, const Tensor& x, const NormRouter& router, const Tensor& h, const Tensor& logits,
                     const Tensor& topk_ids, const Tensor& topk_weights);

}  // namespace cuda

}  // namespace mxmoe
