// The ops on the device: arrays to Tensors, the stream locked and the GIL released, one call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings/cuda_array.h"
#include "ops/embedding/embedding.h"
#include "ops/expert_routing/expert_routing.h"
#include "ops/kv_cache/kv_cache.h"
#include "ops/linear/linear.h"
#include "ops/mxfp4_moe/mxfp4_moe.h"
#include "ops/qkv/qkv.h"
#include "ops/rmsnorm/rmsnorm.h"
#include "ops/rope/rope.h"
#include "ops/sampling/sampling.h"
#include "ops/sink_attention/sink_attention.h"

namespace mxmoe {
namespace cuda {
namespace {

// The current stream, and arrays that are brought to it.
class Arguments {
 public:
  Arguments() : stream_(Stream::current()) {}
  Stream& stream() { return *stream_; }
  DeviceArg in(const py::object& object, const char* name) { return required_on_device(*stream_, object, name); }
  DeviceArg out(const py::object& object, const char* name) {
    return required_on_device(*stream_, object, name, true);
  }
  DeviceArg optional(const py::object& object, const char* name, bool writable = false) {
    return device_arg(*stream_, object, name, writable);
  }

 private:
  std::shared_ptr<Stream> stream_;
};

void bind_rows(py::module_& m) {
  m.def(
      "embedding",
      [](const py::object& token_ids, const py::object& weight, const py::object& out) {
        Arguments args;
        const DeviceArg ids = args.in(token_ids, "token_ids"), w = args.in(weight, "weight"),
                        y = args.out(out, "out");
        const OpScope scope(args.stream());
        embedding(args.stream(), ids, w, y);
      },
      py::arg("token_ids"), py::arg("weight"), py::arg("out"));
  m.def(
      "rmsnorm",
      [](const py::object& x, const py::object& weight, float eps, const py::object& out) {
        Arguments args;
        const DeviceArg a = args.in(x, "x"), w = args.in(weight, "weight"), y = args.out(out, "out");
        const OpScope scope(args.stream());
        rmsnorm(args.stream(), a, w, eps, y);
      },
      py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"));
  m.def(
      "linear",
      [](const py::object& x, const py::object& weight, const py::object& scales, const py::object& bias,
         const std::string& activations, const py::object& residual, const py::object& out) {
        Arguments args;
        const DeviceArg a = args.in(x, "x"), w = args.in(weight, "weight"), y = args.out(out, "out");
        const DeviceArg s = args.optional(scales, "scales"), b = args.optional(bias, "bias");
        const DeviceArg r = args.optional(residual, "residual");
        const Activations rounding = parse_activations(activations);
        const OpScope scope(args.stream());
        linear(args.stream(), a, {w, s, b}, rounding, r, y);
      },
      py::arg("x"), py::arg("weight"), py::arg("scales"), py::arg("bias"), py::arg("activations"),
      py::arg("residual"), py::arg("out"));
  m.def(
      "linear_group",
      [](const py::object& x, const std::vector<std::tuple<py::object, py::object, py::object>>& layers,
         const std::string& activations, const py::object& out) {
        Arguments args;
        const DeviceArg a = args.in(x, "x"), y = args.out(out, "out");
        std::vector<DeviceArg> held;
        std::vector<LinearWeights> weights;
        for (const auto& [weight, scales, bias] : layers) {
          const std::string index = "[" + std::to_string(weights.size()) + "]";
          held.push_back(args.in(weight, ("weight" + index).c_str()));
          held.push_back(args.optional(scales, ("scales" + index).c_str()));
          held.push_back(args.optional(bias, ("bias" + index).c_str()));
          weights.push_back({held[held.size() - 3], held[held.size() - 2], held.back()});
        }
        const Activations rounding = parse_activations(activations);
        const OpScope scope(args.stream());
        linear_group(args.stream(), a, weights, rounding, y);
      },
      py::arg("x"), py::arg("layers"), py::arg("activations"), py::arg("out"));
  m.def(
      "greedy_sample",
      [](const py::object& logits, const py::object& token_ids, const py::object& logprobs,
         const py::object& positions, const py::object& token_id_copies, const py::object& logprob_copies) {
        Arguments args;
        const DeviceArg l = args.in(logits, "logits"), ids = args.out(token_ids, "token_ids");
        const DeviceArg p = args.out(logprobs, "logprobs"), at = args.optional(positions, "positions");
        const DeviceArg more_ids = args.optional(token_id_copies, "token_id_copies", true);
        const DeviceArg more = args.optional(logprob_copies, "logprob_copies", true);
        const OpScope scope(args.stream());
        greedy_sample(args.stream(), l, ids, p, {at, more_ids, more});
      },
      py::arg("logits"), py::arg("token_ids"), py::arg("logprobs"), py::arg("positions"), py::arg("token_id_copies"),
      py::arg("logprob_copies"));
}

void bind_sample(py::module_& m) {
  m.def(
      "sample",
      [](const py::object& logits, const py::object& temperature, const py::object& top_p, const py::object& top_k,
         const py::object& min_p, const py::object& uniforms, const py::object& positions,
         const py::object& token_ids, const py::object& logprobs, const py::object& token_id_copies,
         const py::object& logprob_copies) {
        Arguments args;
        const DeviceArg l = args.in(logits, "logits"), t = args.in(temperature, "temperature");
        const DeviceArg p = args.in(top_p, "top_p"), k = args.in(top_k, "top_k"), least = args.in(min_p, "min_p");
        const DeviceArg u = args.in(uniforms, "uniforms"), at = args.in(positions, "positions");
        const DeviceArg ids = args.out(token_ids, "token_ids"), logs = args.out(logprobs, "logprobs");
        const DeviceArg more_ids = args.optional(token_id_copies, "token_id_copies", true);
        const DeviceArg more = args.optional(logprob_copies, "logprob_copies", true);
        const SampleCopies copies = token_id_copies.is_none() ? SampleCopies{} : SampleCopies{at, more_ids, more};
        const OpScope scope(args.stream());
        sample(args.stream(), l, {t, p, least, k, u, at}, ids, logs, copies);
      },
      py::arg("logits"), py::arg("temperature"), py::arg("top_p"), py::arg("top_k"), py::arg("min_p"),
      py::arg("uniforms"), py::arg("positions"), py::arg("token_ids"), py::arg("logprobs"),
      py::arg("token_id_copies"), py::arg("logprob_copies"));
}

void bind_routing(py::module_& m) {
  m.def(
      "expert_routing",
      [](const py::object& router_logits, const py::object& topk_ids, const py::object& topk_weights) {
        Arguments args;
        const DeviceArg logits = args.in(router_logits, "router_logits"), ids = args.out(topk_ids, "topk_ids");
        const DeviceArg w = args.out(topk_weights, "topk_weights");
        const OpScope scope(args.stream());
        expert_routing(args.stream(), logits, ids, w);
      },
      py::arg("router_logits"), py::arg("topk_ids"), py::arg("topk_weights"));
  m.def(
      "rmsnorm_routing",
      [](const py::object& x, const py::object& norm_weight, float eps, const py::object& router_weight,
         const py::object& router_bias, const py::object& h, const py::object& logits, const py::object& topk_ids,
         const py::object& topk_weights) {
        Arguments args;
        const DeviceArg a = args.in(x, "x"), norm = args.in(norm_weight, "norm_weight");
        const DeviceArg w = args.in(router_weight, "router_weight"), b = args.in(router_bias, "router_bias");
        const DeviceArg y = args.out(h, "h"), l = args.out(logits, "logits");
        const DeviceArg ids = args.out(topk_ids, "topk_ids"), shares = args.out(topk_weights, "topk_weights");
        const OpScope scope(args.stream());
        rmsnorm_routing(args.stream(), a, {norm, eps, w, b}, y, l, ids, shares);
      },
      py::arg("x"), py::arg("norm_weight"), py::arg("eps"), py::arg("router_weight"), py::arg("router_bias"),
      py::arg("h"), py::arg("logits"), py::arg("topk_ids"), py::arg("topk_weights"));
}

void bind_mxfp4_moe(py::module_& m) {
  m.def(
      "mxfp4_moe",
      [](const py::object& x, const py::object& topk_ids, const py::object& topk_weights,
         const py::object& gate_up_blocks, const py::object& gate_up_scales, const py::object& gate_up_bias,
         const py::object& down_blocks, const py::object& down_scales, const py::object& down_bias,
         const std::string& activations, float swiglu_alpha, float swiglu_limit, int64_t first_expert,
         bool foldable_scales, const py::object& residual, const py::object& out) {
        Arguments args;
        const DeviceArg a = args.in(x, "x"), ids = args.in(topk_ids, "topk_ids");
        const DeviceArg shares = args.in(topk_weights, "topk_weights");
        const DeviceArg gb = args.in(gate_up_blocks, "gate_up_blocks"),
                        gs = args.in(gate_up_scales, "gate_up_scales");
        const DeviceArg gbias = args.in(gate_up_bias, "gate_up_bias"), db = args.in(down_blocks, "down_blocks");
        const DeviceArg ds = args.in(down_scales, "down_scales"), dbias = args.in(down_bias, "down_bias");
        const DeviceArg r = args.optional(residual, "residual"), y = args.out(out, "out");
        const MoeParams params{parse_activations(activations), swiglu_alpha, swiglu_limit, first_expert,
                               foldable_scales};
        const OpScope scope(args.stream());
        mxfp4_moe(args.stream(), a, ids, shares, {gb, gs, gbias, db, ds, dbias}, params, r, y);
      },
      py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"), py::arg("gate_up_blocks"),
      py::arg("gate_up_scales"), py::arg("gate_up_bias"), py::arg("down_blocks"), py::arg("down_scales"),
      py::arg("down_bias"), py::arg("activations"), py::arg("swiglu_alpha"), py::arg("swiglu_limit"),
      py::arg("first_expert"), py::arg("foldable_scales"), py::arg("residual"), py::arg("out"));
}

void bind_rope(py::module_& m) {
  m.def(
      "rope",
      [](const py::object& x, const py::object& cos, const py::object& sin, const py::object& out) {
        Arguments args;
        const DeviceArg a = args.in(x, "x"), c = args.in(cos, "cos"), s = args.in(sin, "sin");
        const DeviceArg y = args.out(out, "out");
        const OpScope scope(args.stream());
        rope(args.stream(), a, c, s, y);
      },
      py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("out"));
  m.def(
      "rope_kv_write",
      [](const py::object& qkv, const py::object& bias, const py::object& cos, const py::object& sin,
         const py::object& positions, const py::object& slots, const py::object& k_cache, const py::object& v_cache,
         const py::object& q) {
        Arguments args;
        const DeviceArg a = args.in(qkv, "qkv"), b = args.optional(bias, "bias");
        const DeviceArg c = args.in(cos, "cos"), s = args.in(sin, "sin"), at = args.in(positions, "positions");
        const DeviceArg places = args.in(slots, "slots"), kc = args.out(k_cache, "k_cache");
        const DeviceArg vc = args.out(v_cache, "v_cache"), y = args.out(q, "q");
        const OpScope scope(args.stream());
        rope_kv_write(args.stream(), a, b, {c, s, at}, places, {kc, vc, Tensor(), Tensor()}, y);
      },
      py::arg("qkv"), py::arg("bias"), py::arg("cos"), py::arg("sin"), py::arg("positions"), py::arg("slots"),
      py::arg("k_cache"), py::arg("v_cache"), py::arg("q"));
}

using Layer = std::pair<py::object, py::object>;  // weight and bias

void bind_qkv(py::module_& m) {
  m.def(
      "rmsnorm_qkv_rope",
      [](const py::object& x, const py::object& norm_weight, float eps, const Layer& q, const Layer& k,
         const Layer& v, const py::object& cos, const py::object& sin, const py::object& positions,
         const py::object& slots, const py::object& k_cache, const py::object& v_cache, const py::object& out) {
        Arguments args;
        const DeviceArg a = args.in(x, "x"), norm = args.in(norm_weight, "norm_weight");
        const DeviceArg wq = args.in(q.first, "q_weight"), bq = args.optional(q.second, "q_bias");
        const DeviceArg wk = args.in(k.first, "k_weight"), bk = args.optional(k.second, "k_bias");
        const DeviceArg wv = args.in(v.first, "v_weight"), bv = args.optional(v.second, "v_bias");
        const DeviceArg c = args.in(cos, "cos"), s = args.in(sin, "sin"), at = args.in(positions, "positions");
        const DeviceArg places = args.in(slots, "slots"), kc = args.out(k_cache, "k_cache");
        const DeviceArg vc = args.out(v_cache, "v_cache"), y = args.out(out, "q");
        const OpScope scope(args.stream());
        rmsnorm_qkv_rope(args.stream(), a, {norm, eps, {wq, Tensor(), bq}, {wk, Tensor(), bk}, {wv, Tensor(), bv}},
                         {c, s, at}, places, {kc, vc, Tensor(), Tensor()}, y);
      },
      py::arg("x"), py::arg("norm_weight"), py::arg("eps"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"),
      py::arg("sin"), py::arg("positions"), py::arg("slots"), py::arg("k_cache"), py::arg("v_cache"), py::arg("out"));
}

void bind_attention(py::module_& m) {
  m.def(
      "kv_cache_write",
      [](const py::object& k, const py::object& v, const py::object& k_cache, const py::object& v_cache,
         const py::object& slots, const py::object& k_scales, const py::object& v_scales) {
        Arguments args;
        const DeviceArg a = args.in(k, "k"), b = args.in(v, "v"), at = args.in(slots, "slots");
        const DeviceArg kc = args.out(k_cache, "k_cache"), vc = args.out(v_cache, "v_cache");
        const DeviceArg ks = args.optional(k_scales, "k_scales", true),
                        vs = args.optional(v_scales, "v_scales", true);
        const OpScope scope(args.stream());
        kv_cache_write(args.stream(), a, b, at, {kc, vc, ks, vs});
      },
      py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"), py::arg("k_scales"),
      py::arg("v_scales"));
  m.def(
      "kv_cache_advance",
      [](const py::object& seq_lens, const py::object& positions,
         const std::vector<std::pair<py::object, py::object>>& tables, int64_t block_size) {
        Arguments args;
        const DeviceArg lens = args.out(seq_lens, "seq_lens"), at = args.out(positions, "positions");
        std::vector<DeviceArg> held;
        std::vector<SlotTable> all;
        for (const auto& [block_table, slots] : tables) {
          held.push_back(args.in(block_table, "block_table"));
          held.push_back(args.out(slots, "slots"));
          all.push_back({held[held.size() - 2], held.back()});
        }
        const OpScope scope(args.stream());
        kv_cache_advance(args.stream(), lens, at, all, block_size);
      },
      py::arg("seq_lens"), py::arg("positions"), py::arg("tables"), py::arg("block_size"));
  m.def(
      "sink_attention",
      [](const py::object& q, const py::object& k_cache, const py::object& v_cache, const py::object& sinks,
         const py::object& block_table, const py::object& cu_seqlens, const py::object& seq_lens,
         const py::object& key_starts, int64_t max_seq_len, float sm_scale, int64_t sliding_window,
         const std::string& activations, const py::object& k_scales, const py::object& v_scales,
         const py::object& sink_share, const py::object& out) {
        Arguments args;
        const DeviceArg ks = args.optional(k_scales, "k_scales"), vs = args.optional(v_scales, "v_scales");
        const DeviceArg a = args.in(q, "q"), kc = args.in(k_cache, "k_cache"), vc = args.in(v_cache, "v_cache");
        const DeviceArg s = args.in(sinks, "sinks"), table = args.in(block_table, "block_table");
        const DeviceArg cu = args.in(cu_seqlens, "cu_seqlens"), lens = args.in(seq_lens, "seq_lens");
        const DeviceArg starts = args.optional(key_starts, "key_starts");
        const DeviceArg share = args.optional(sink_share, "sink_share", true), y = args.out(out, "out");
        const Activations rounding = parse_activations(activations);
        const OpScope scope(args.stream());
        sink_attention(args.stream(), a, {kc, vc, ks, vs}, s, {cu, lens, table, starts}, max_seq_len, sm_scale,
                       sliding_window, rounding, share, y);
      },
      py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("sinks"), py::arg("block_table"),
      py::arg("cu_seqlens"), py::arg("seq_lens"), py::arg("key_starts"), py::arg("max_seq_len"), py::arg("sm_scale"),
      py::arg("sliding_window"), py::arg("activations"), py::arg("k_scales"), py::arg("v_scales"),
      py::arg("sink_share"), py::arg("out"));
}

}  // namespace

void bind_ops(py::module_& m) {
  bind_rows(m);
  bind_sample(m);
  bind_routing(m);
  bind_mxfp4_moe(m);
  bind_rope(m);
  bind_qkv(m);
  bind_attention(m);
}

}  // namespace cuda
}  // namespace mxmoe
