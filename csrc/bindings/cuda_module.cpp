#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/cuda_array.h"
#include "core/check.h"
#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/kernel_record.h"

#if defined(MXMOE_CUDA_EMULATION)
#include "emulation/bind_emulation.h"
#endif

namespace py = pybind11;

namespace mxmoe {
namespace cuda {
namespace {

void bind_status(py::module_& m) {
  py::class_<Device>(m, "Device", py::module_local())
      .def_readonly("index", &Device::index)
      .def_readonly("name", &Device::name)
      .def_property_readonly("compute_capability", [](const Device& d) { return std::make_pair(d.major, d.minor); })
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("total_bytes", &Device::total_bytes)
      .def_readonly("l2_bytes", &Device::l2_bytes)
      .def_readonly("shared_bytes_per_block", &Device::shared_bytes_per_block);
  py::class_<Status>(m, "Status", py::module_local())
      .def_readonly("runtime_version", &Status::runtime_version)
      .def_readonly("driver_version", &Status::driver_version)
      .def_readonly("problem", &Status::problem)
      .def_readonly("devices", &Status::devices);
  m.def("status", &status);
  m.def("architectures", [] { return std::string(MXMOE_CUDA_ARCHITECTURES); });
  m.def("available_architectures", &available_architectures, py::arg("device") = 0);
  m.def("active_architecture", &active_architecture, py::arg("device") = 0);
  m.def("set_architecture", &set_architecture, py::arg("name"));
  m.def("last_kernels", &last_kernels);
  m.def("memory_info", [] {
    size_t free_bytes = 0, total_bytes = 0;
    MXMOE_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
    return std::make_pair(free_bytes, total_bytes);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace mxmoe

PYBIND11_MODULE(MXMOE_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels and device memory of mxmoe; mxmoe.cuda is the public face.";
  const std::string name = std::string(py::str(m.attr("__name__"))) + ".CudaError";
  static PyObject* const error = PyErr_NewException(name.c_str(), PyExc_RuntimeError, nullptr);
  m.attr("CudaError") = py::handle(error);
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const mxmoe::TypeError& e) {
      py::set_error(PyExc_TypeError, e.what());
    } catch (const mxmoe::ValueError& e) {
      py::set_error(PyExc_ValueError, e.what());
    } catch (const mxmoe::cuda::OutOfMemory& e) {
      py::set_error(PyExc_MemoryError, e.what());
    } catch (const mxmoe::cuda::CudaError& e) {
      py::set_error(error, e.what());
    }
  });
  mxmoe::cuda::bind_status(m);
  mxmoe::cuda::bind_array(m);
  mxmoe::cuda::bind_ops(m);
#if defined(MXMOE_CUDA_EMULATION)
  mxmoe::emulation::bind_emulation(m);
#endif
}
