#include "bindings/bind.h"
#include "bindings/recording.h"
#include "bindings/tensor.h"
#include "ops/rmsnorm/rmsnorm.h"

namespace mxmoe {

void bind_rmsnorm(py::module_& m) {
  m.def(
      "rmsnorm",
      [](const py::object& x, const py::object& weight, double eps, const py::object& out) {
        const TensorArg a = required(x, "x"), w = required(weight, "weight"), y = required(out, "out", true);
        run_op([=] { rmsnorm(a, w, static_cast<float>(eps), y); });
      },
      py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"));
}

}  // namespace mxmoe
