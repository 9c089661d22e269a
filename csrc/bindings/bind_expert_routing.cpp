#include "bindings/bind.h"
#include "bindings/recording.h"
#include "bindings/tensor.h"
#include "ops/expert_routing/expert_routing.h"

namespace mxmoe {

void bind_expert_routing(py::module_& m) {
  m.def(
      "expert_routing",
      [](const py::object& router_logits, const py::object& topk_ids, const py::object& topk_weights) {
        const TensorArg logits = required(router_logits, "router_logits");
        const TensorArg ids = required(topk_ids, "topk_ids", true), w = required(topk_weights, "topk_weights", true);
        run_op([=] { expert_routing(logits, ids, w); });
      },
      py::arg("router_logits"), py::arg("topk_ids"), py::arg("topk_weights"));
  m.def(
      "expert_offsets",
      [](const py::object& topk_ids, int64_t num_experts, const py::object& offsets, const py::object& order) {
        const TensorArg ids = required(topk_ids, "topk_ids");
        const TensorArg o = required(offsets, "expert_offsets", true), sorted = required(order, "order", true);
        run_op([=] { expert_offsets(ids, num_experts, o, sorted); });
      },
      py::arg("topk_ids"), py::arg("num_experts"), py::arg("offsets"), py::arg("order"));
}

}  // namespace mxmoe
