// From a Python object to a Tensor: NumPy arrays directly (ml_dtypes' bfloat16 among them), anything else
// through DLPack or the buffer protocol. Nothing is copied.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <string>

#include "bindings/dlpack_abi.h"
#include "core/types.h"

namespace mxmoe {

namespace py = pybind11;

// Holds a reference (or the DLPack capsule) for as long as the Tensor is used.
class TensorArg {
 public:
  TensorArg() = default;
  const Tensor& operator*() const { return tensor_; }
  operator const Tensor&() const { return tensor_; }

 private:
  friend TensorArg to_tensor(py::handle object, const char* name, bool writable);
  Tensor tensor_;
  py::object owner_;
};

// Throws TypeError or ValueError naming the argument when the object is no CPU array with an accepted dtype,
// at most four axes, a contiguous last axis and aligned memory, or is read-only where `writable`. None gives
// an empty Tensor.
TensorArg to_tensor(py::handle object, const char* name, bool writable = false);

inline TensorArg input(py::handle object, const char* name) { return to_tensor(object, name, false); }
inline TensorArg output(py::handle object, const char* name) { return to_tensor(object, name, true); }
// The same, but None is an error.
TensorArg required(py::handle object, const char* name, bool writable = false);

// What a DLPack export describes, wherever it lies, after the same checks.
Tensor dlpack_tensor(const dlpack::Array& array, const char* name, bool writable);

using TensorDescription = py::typing::Tuple<py::typing::Tuple<py::int_, py::ellipsis>, py::str>;
// (shape, name of the dtype), after the same checks.
TensorDescription describe(py::handle object, const char* name);

Activations parse_activations(const std::string& name);

}  // namespace mxmoe
