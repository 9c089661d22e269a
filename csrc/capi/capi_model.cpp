#include "capi/capi.h"
#include "ops/expert_routing/expert_routing.h"
#include "ops/kv_cache/kv_cache.h"
#include "ops/mxfp4_moe/mxfp4_moe.h"
#include "ops/sink_attention/sink_attention.h"

using namespace mxmoe;
using namespace mxmoe::capi;

namespace {
KvCache view_cache(const mxmoe_kv_cache* cache, Access access) {
  const mxmoe_kv_cache& c = pointed("cache", cache);
  return {required("k_cache", c.k, access), required("v_cache", c.v, access),
          optional("k_scales", c.k_scales, access), optional("v_scales", c.v_scales, access)};
}
}  // namespace

int mxmoe_expert_routing(const mxmoe_tensor* router_logits, const mxmoe_tensor* topk_ids,
                         const mxmoe_tensor* topk_weights) {
  return guarded([&] {
    expert_routing(required("router_logits", router_logits), required("topk_ids", topk_ids, Access::kWrite),
                   required("topk_weights", topk_weights, Access::kWrite));
  });
}

int mxmoe_expert_offsets(const mxmoe_tensor* topk_ids, int64_t num_experts, const mxmoe_tensor* offsets,
                         const mxmoe_tensor* order) {
  return guarded([&] {
    expert_offsets(required("topk_ids", topk_ids), num_experts, required("expert_offsets", offsets, Access::kWrite),
                   required("order", order, Access::kWrite));
  });
}

int mxmoe_mxfp4_moe(const mxmoe_tensor* x, const mxmoe_tensor* topk_ids, const mxmoe_tensor* topk_weights,
                    const mxmoe_moe_weights* weights, int activations, float swiglu_alpha, float swiglu_limit,
                    int64_t first_expert, const mxmoe_tensor* residual, const mxmoe_tensor* out) {
  return guarded([&] {
    const mxmoe_moe_weights& w = pointed("weights", weights);
    const MoeWeights views{required("gate_up_blocks", w.gate_up_blocks), required("gate_up_scales", w.gate_up_scales),
                           required("gate_up_bias", w.gate_up_bias),     required("down_blocks", w.down_blocks),
                           required("down_scales", w.down_scales),       required("down_bias", w.down_bias)};
    const MoeParams params{parse_activations(activations), swiglu_alpha, swiglu_limit, first_expert};
    mxfp4_moe(required("x", x), required("topk_ids", topk_ids), required("topk_weights", topk_weights), views, params,
              optional("residual", residual), required("out", out, Access::kWrite));
  });
}

int mxmoe_kv_cache_write(const mxmoe_tensor* k, const mxmoe_tensor* v, const mxmoe_kv_cache* cache,
                         const mxmoe_tensor* slots) {
  return guarded([&] {
    kv_cache_write(required("k", k), required("v", v), required("slots", slots), view_cache(cache, Access::kWrite));
  });
}

int mxmoe_sink_attention(const mxmoe_tensor* q, const mxmoe_kv_cache* cache, const mxmoe_tensor* sinks,
                         const mxmoe_attention_batch* batch, float sm_scale, int64_t sliding_window, int activations,
                         const mxmoe_tensor* sink_share, const mxmoe_tensor* out) {
  return guarded([&] {
    const mxmoe_attention_batch& b = pointed("batch", batch);
    const AttentionBatch views{required("cu_seqlens", b.cu_seqlens), required("seq_lens", b.seq_lens),
                               required("block_table", b.block_table), optional("key_starts", b.key_starts)};
    sink_attention(required("q", q), view_cache(cache, Access::kRead), required("sinks", sinks), views, sm_scale,
                   sliding_window, parse_activations(activations), optional("sink_share", sink_share, Access::kWrite),
                   required("out", out, Access::kWrite));
  });
}
