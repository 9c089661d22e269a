#include "bindings/bind.h"
#include "bindings/recording.h"
#include "bindings/tensor.h"
#include "ops/kv_cache/kv_cache.h"
#include "ops/sink_attention/sink_attention.h"

namespace mxmoe {

void bind_sink_attention(py::module_& m) {
  m.def(
      "kv_cache_write",
      [](const py::object& k, const py::object& v, const py::object& k_cache, const py::object& v_cache,
         const py::object& slots, const py::object& k_scales, const py::object& v_scales) {
        const TensorArg a = required(k, "k"), b = required(v, "v"), at = required(slots, "slots");
        const TensorArg kc = required(k_cache, "k_cache", true), vc = required(v_cache, "v_cache", true);
        const TensorArg ks = output(k_scales, "k_scales"), vs = output(v_scales, "v_scales");
        run_op([=] { kv_cache_write(a, b, at, {kc, vc, ks, vs}); });
      },
      py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"), py::arg("k_scales"),
      py::arg("v_scales"));
  m.def(
      "sink_attention",
      [](const py::object& q, const py::object& k_cache, const py::object& v_cache, const py::object& sinks,
         const py::object& block_table, const py::object& cu_seqlens, const py::object& seq_lens,
         const py::object& key_starts, double sm_scale, int64_t sliding_window, const std::string& activations,
         const py::object& k_scales, const py::object& v_scales, const py::object& sink_share,
         const py::object& out) {
        const TensorArg a = required(q, "q"), kc = required(k_cache, "k_cache"), vc = required(v_cache, "v_cache");
        const TensorArg s = required(sinks, "sinks"), table = required(block_table, "block_table");
        const TensorArg cu = required(cu_seqlens, "cu_seqlens"), lens = required(seq_lens, "seq_lens");
        const TensorArg starts = input(key_starts, "key_starts");
        const TensorArg ks = input(k_scales, "k_scales"), vs = input(v_scales, "v_scales");
        const TensorArg share = output(sink_share, "sink_share"), y = required(out, "out", true);
        const Activations rounding = parse_activations(activations);
        run_op([=] {
          sink_attention(a, {kc, vc, ks, vs}, s, {cu, lens, table, starts}, static_cast<float>(sm_scale),
                         sliding_window, rounding, share, y);
        });
      },
      py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("sinks"), py::arg("block_table"),
      py::arg("cu_seqlens"), py::arg("seq_lens"), py::arg("key_starts"), py::arg("sm_scale"),
      py::arg("sliding_window"), py::arg("activations"), py::arg("k_scales"), py::arg("v_scales"),
      py::arg("sink_share"), py::arg("out"));
}

}  // namespace mxmoe
