#include "bindings/bind.h"
#include "bindings/recording.h"
#include "bindings/tensor.h"
#include "ops/embedding/embedding.h"

namespace mxmoe {

void bind_embedding(py::module_& m) {
  m.def(
      "embedding",
      [](const py::object& token_ids, const py::object& weight, const py::object& out) {
        const TensorArg ids = required(token_ids, "token_ids"), w = required(weight, "weight");
        const TensorArg y = required(out, "out", true);
        run_op([=] { embedding(ids, w, y); });
      },
      py::arg("token_ids"), py::arg("weight"), py::arg("out"));
}

}  // namespace mxmoe
