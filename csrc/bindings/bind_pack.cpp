#include "bindings/bind.h"
#include "bindings/tensor.h"
#include "core/check.h"
#include "ops/pack/pack.h"

namespace mxmoe {

namespace {
PackedForm parse_form(const std::string& name) {
  if (name == "bf16") return PackedForm::bf16;
  if (name == "int8") return PackedForm::i8;
  check_value(name == "mxfp4", "weights is '", name, "'; wanted 'mxfp4', 'int8' or 'bf16'");
  return PackedForm::mxfp4;
}
}  // namespace

void bind_pack(py::module_& m) {
  m.def(
      "prefers_packed",
      [](const std::string& activations, const std::string& weights) {
        return prefers_packed(parse_activations(activations), parse_form(weights));
      },
      py::arg("activations"), py::arg("weights"));
  m.def(
      "pack_mxfp4",
      [](const py::object& blocks, const py::object& scales, const py::object& packed,
         const py::object& packed_scales) {
        const TensorArg b = required(blocks, "blocks"), s = required(scales, "scales");
        const TensorArg p = required(packed, "packed", true), q = required(packed_scales, "packed_scales", true);
        const Unlocked unlocked;
        pack_mxfp4(b, s, p, q);
      },
      py::arg("blocks"), py::arg("scales"), py::arg("packed"), py::arg("packed_scales"));
  m.def(
      "unpack_mxfp4",
      [](const py::object& packed, const py::object& packed_scales, const py::object& blocks,
         const py::object& scales) {
        const TensorArg p = required(packed, "packed"), q = required(packed_scales, "packed_scales");
        const TensorArg b = required(blocks, "blocks", true), s = required(scales, "scales", true);
        const Unlocked unlocked;
        unpack_mxfp4(p, q, b, s);
      },
      py::arg("packed"), py::arg("packed_scales"), py::arg("blocks"), py::arg("scales"));
  m.def(
      "pack_linear",
      [](const py::object& weight, const py::object& scales, const py::object& packed,
         const py::object& packed_scales) {
        const TensorArg w = required(weight, "weight"), s = to_tensor(scales, "scales");
        const TensorArg p = required(packed, "packed", true), q = to_tensor(packed_scales, "packed_scales", true);
        const Unlocked unlocked;
        pack_linear(w, s, p, q);
      },
      py::arg("weight"), py::arg("scales"), py::arg("packed"), py::arg("packed_scales"));
  m.def(
      "unpack_linear",
      [](const py::object& packed, const py::object& packed_scales, const py::object& weight,
         const py::object& scales) {
        const TensorArg p = required(packed, "packed"), q = to_tensor(packed_scales, "packed_scales");
        const TensorArg w = required(weight, "weight", true), s = to_tensor(scales, "scales", true);
        const Unlocked unlocked;
        unpack_linear(p, q, w, s);
      },
      py::arg("packed"), py::arg("packed_scales"), py::arg("weight"), py::arg("scales"));
}

}  // namespace mxmoe
