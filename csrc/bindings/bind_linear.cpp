#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/bind.h"
#include "bindings/recording.h"
#include "bindings/tensor.h"
#include "ops/linear/linear.h"

namespace mxmoe {

void bind_linear(py::module_& m) {
  m.def(
      "linear",
      [](const py::object& x, const py::object& weight, const py::object& scales, const py::object& bias,
         const std::string& activations, const py::object& residual, const py::object& out) {
        const TensorArg a = required(x, "x"), w = required(weight, "weight"), y = required(out, "out", true);
        const TensorArg s = to_tensor(scales, "scales"), b = to_tensor(bias, "bias");
        const TensorArg r = to_tensor(residual, "residual");
        const Activations rounding = parse_activations(activations);
        run_op([=] { linear(a, {w, s, b}, rounding, r, y); });
      },
      py::arg("x"), py::arg("weight"), py::arg("scales"), py::arg("bias"), py::arg("activations"),
      py::arg("residual"), py::arg("out"));
  m.def(
      "linear_group",
      [](const py::object& x, const std::vector<std::array<py::object, 3>>& layers, const std::string& activations,
         const py::object& out) {
        const TensorArg a = required(x, "x"), y = required(out, "out", true);
        std::vector<std::array<TensorArg, 3>> held;  // keeps what the views look at
        std::vector<LinearWeights> weights;
        for (const auto& [weight, scales, bias] : layers) {
          held.push_back({required(weight, "weight"), to_tensor(scales, "scales"), to_tensor(bias, "bias")});
          weights.push_back({held.back()[0], held.back()[1], held.back()[2]});
        }
        const Activations rounding = parse_activations(activations);
        run_op([=, held = std::move(held)] { linear_group(a, weights, rounding, y); });
      },
      py::arg("x"), py::arg("layers"), py::arg("activations"), py::arg("out"));
}

}  // namespace mxmoe
