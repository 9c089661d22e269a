#include "bindings/bind.h"
#include "bindings/recording.h"
#include "bindings/tensor.h"
#include "core/check.h"
#include "ops/rope/rope.h"

namespace mxmoe {

void bind_rope(py::module_& m) {
  m.def(
      "rope_inv_freq",
      [](int64_t head_dim, double theta, double factor, int64_t original_max_position_embeddings, double beta_fast,
         double beta_slow, bool truncate) {
        constexpr int64_t kMaxHeadDim = 65536;  // bounds what is allocated for a size from outside
        check_value(head_dim <= kMaxHeadDim, "head_dim is ", head_dim, "; wanted at most ", kMaxHeadDim);
        py::array_t<double> inv_freq(head_dim > 0 ? head_dim / 2 : 0);
        const YarnParams yarn{theta, factor, original_max_position_embeddings, beta_fast, beta_slow, truncate};
        const DefaultFloatEnvironment environment;
        const double scaling = rope_inv_freq(head_dim, yarn, inv_freq.mutable_data());
        return py::make_tuple(inv_freq, scaling);
      },
      py::arg("head_dim"), py::arg("theta"), py::arg("factor"), py::arg("original_max_position_embeddings"),
      py::arg("beta_fast"), py::arg("beta_slow"), py::arg("truncate"));
  m.def(
      "rope_cos_sin",
      [](const py::object& positions, const py::object& inv_freq, double scaling, const py::object& cos,
         const py::object& sin) {
        const TensorArg p = required(positions, "positions"), f = required(inv_freq, "inv_freq");
        const TensorArg c = required(cos, "cos", true), s = required(sin, "sin", true);
        run_op([=] { rope_cos_sin(p, f, scaling, c, s); });
      },
      py::arg("positions"), py::arg("inv_freq"), py::arg("scaling"), py::arg("cos"), py::arg("sin"));
  m.def(
      "rope",
      [](const py::object& x, const py::object& cos, const py::object& sin, const py::object& out) {
        const TensorArg a = required(x, "x"), c = required(cos, "cos"), s = required(sin, "sin");
        const TensorArg y = required(out, "out", true);
        run_op([=] { rope(a, c, s, y); });
      },
      py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("out"));
}

}  // namespace mxmoe
