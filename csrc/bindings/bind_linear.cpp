#include "bindings/bind.h"
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
        const py::gil_scoped_release unlocked;
        linear(a, w, s, b, rounding, r, y);
      },
      py::arg("x"), py::arg("weight"), py::arg("scales"), py::arg("bias"), py::arg("activations"),
      py::arg("residual"), py::arg("out"));
}

}  // namespace mxmoe
