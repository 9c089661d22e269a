#include "bindings/bind.h"
#include "bindings/recording.h"
#include "bindings/tensor.h"
#include "ops/mxfp4_moe/mxfp4_moe.h"

namespace mxmoe {

void bind_mxfp4_moe(py::module_& m) {
  m.def(
      "mxfp4_moe",
      [](const py::object& x, const py::object& topk_ids, const py::object& topk_weights,
         const py::object& gate_up_blocks, const py::object& gate_up_scales, const py::object& gate_up_bias,
         const py::object& down_blocks, const py::object& down_scales, const py::object& down_bias,
         const std::string& activations, double swiglu_alpha, double swiglu_limit, int64_t first_expert,
         const py::object& residual, const py::object& out) {
        const TensorArg a = required(x, "x"), ids = required(topk_ids, "topk_ids");
        const TensorArg shares = required(topk_weights, "topk_weights");
        const TensorArg gb = required(gate_up_blocks, "gate_up_blocks"),
                        gs = required(gate_up_scales, "gate_up_scales"),
                        gbias = required(gate_up_bias, "gate_up_bias");
        const TensorArg db = required(down_blocks, "down_blocks"), ds = required(down_scales, "down_scales"),
                        dbias = required(down_bias, "down_bias");
        const TensorArg r = to_tensor(residual, "residual"), y = required(out, "out", true);
        const Activations rounding = parse_activations(activations);
        run_op([=] {
          const MoeParams params{rounding, static_cast<float>(swiglu_alpha), static_cast<float>(swiglu_limit),
                                 first_expert};
          mxfp4_moe(a, ids, shares, {gb, gs, gbias, db, ds, dbias}, params, r, y);
        });
      },
      py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"), py::arg("gate_up_blocks"),
      py::arg("gate_up_scales"), py::arg("gate_up_bias"), py::arg("down_blocks"), py::arg("down_scales"),
      py::arg("down_bias"), py::arg("activations"), py::arg("swiglu_alpha"), py::arg("swiglu_limit"),
      py::arg("first_expert"), py::arg("residual"), py::arg("out"));
}

}  // namespace mxmoe
