#include "bindings/bind.h"
#include "bindings/tensor.h"
#include "ops/quantize/quantize.h"

namespace mxmoe {

void bind_quantize(py::module_& m) {
  m.def(
      "first_not_finite",
      [](const py::object& x) {
        const TensorArg values = required(x, "x");
        const Unlocked unlocked;
        return first_not_finite(values);
      },
      py::arg("x"));
  m.def(
      "mxfp4_dequantize",
      [](const py::object& blocks, const py::object& scales, const py::object& out) {
        const TensorArg b = required(blocks, "blocks"), s = required(scales, "scales"),
                        y = required(out, "out", true);
        const Unlocked unlocked;
        mxfp4_dequantize(b, s, y);
      },
      py::arg("blocks"), py::arg("scales"), py::arg("out"));
  m.def(
      "mxfp4_quantize",
      [](const py::object& x, const py::object& blocks, const py::object& scales) {
        const TensorArg values = required(x, "x");
        const TensorArg b = required(blocks, "blocks", true), s = required(scales, "scales", true);
        const Unlocked unlocked;
        mxfp4_quantize(values, b, s);
      },
      py::arg("x"), py::arg("blocks"), py::arg("scales"));
  m.def(
      "int8_quantize",
      [](const py::object& x, const py::object& codes, const py::object& scales) {
        const TensorArg values = required(x, "x");
        const TensorArg c = required(codes, "codes", true), s = required(scales, "scales", true);
        const Unlocked unlocked;
        int8_quantize(values, c, s);
      },
      py::arg("x"), py::arg("codes"), py::arg("scales"));
}

}  // namespace mxmoe
