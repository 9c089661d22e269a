// From a Python object to an array on the device, and back.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>

#include "bindings/tensor.h"
#include "cuda/device_array.h"
#include "cuda/stream.h"

namespace mxmoe {
namespace cuda {

// Holds the array for as long as the Tensor is used.
class DeviceArg {
 public:
  DeviceArg() = default;
  explicit DeviceArg(DeviceArray array) : array_(std::move(array)) {}
  operator const Tensor&() const { return array_.tensor; }
  const DeviceArray& array() const { return array_; }

 private:
  DeviceArray array_;
};

// Ours, or through DLPack, after which the stream waits for the producer's. Throws TypeError or ValueError naming
// the argument, as to_tensor does for host arrays. None gives an empty Tensor.
DeviceArg device_arg(Stream& stream, py::handle object, const char* name, bool writable = false);
// The same, but None is an error.
DeviceArg required_on_device(Stream& stream, py::handle object, const char* name, bool writable = false);

// What an op's binding holds while it launches: the stream, locked, and no GIL.
class OpScope {
 public:
  explicit OpScope(Stream& stream) : lock_(stream.mutex()) {}

 private:
  py::gil_scoped_release unlocked_;
  std::lock_guard<std::mutex> lock_;
};

void bind_array(py::module_& m);
void bind_ops(py::module_& m);

}  // namespace cuda
}  // namespace mxmoe
