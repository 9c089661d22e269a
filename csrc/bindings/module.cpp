#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include "bindings/bind.h"
#include "bindings/tensor.h"
#include "core/check.h"
#include "core/isa.h"
#include "core/thread_pool.h"

namespace py = pybind11;

namespace mxmoe {
namespace {

using KernelsOfOp =
    py::typing::Tuple<py::int_, py::typing::Optional<py::str>, py::typing::List<py::typing::Tuple<py::str, py::str>>>;

void bind_machine(py::module_& m) {
  m.def("active_isa", [] { return std::string(active_isa().name); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("available_isas", &available_isas);
  m.def("cpu_features", [] { return feature_names(cpu_features()); });
  m.def("hardware_threads", &hardware_threads);
  m.def("current_num_threads", &current_num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("num_threads"));
  // op -> (index of the kernel in force, the kernel that ran last or None, [(kernel, what it lacks here)])
  m.def("kernels", [] {
    py::typing::Dict<py::str, KernelsOfOp> ops;
    for (const DispatchBase* table : DispatchBase::all()) {
      py::list rows;
      for (const KernelRow& row : table->rows()) {
        const uint32_t missing = row.required & ~usable_features();
        rows.append(py::make_tuple(row.name, missing == 0 ? std::string() : feature_names(missing)));
      }
      py::object last = py::none();
      if (table->last() != nullptr) last = py::str(table->last());
      ops[table->op()] = py::make_tuple(table->pick_index(), last, rows);
    }
    return ops;
  });
}

}  // namespace
}  // namespace mxmoe

PYBIND11_MODULE(_core, m) {
  m.doc() = "Kernels of mxmoe. Outputs are written into the arrays passed for them; mxmoe.ops is the public face.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const mxmoe::TypeError& e) {
      py::set_error(PyExc_TypeError, e.what());
    } catch (const mxmoe::ValueError& e) {
      py::set_error(PyExc_ValueError, e.what());
    }
  });
  m.def("describe", &mxmoe::describe, py::arg("array"), py::arg("name"));
  mxmoe::bind_machine(m);
  mxmoe::bind_rmsnorm(m);
  mxmoe::bind_rope(m);
  mxmoe::bind_linear(m);
  mxmoe::bind_expert_routing(m);
  mxmoe::bind_mxfp4_moe(m);
  mxmoe::bind_sink_attention(m);
  mxmoe::bind_embedding(m);
  mxmoe::bind_quantize(m);
  mxmoe::bind_pack(m);
  mxmoe::bind_ceilings(m);
  mxmoe::bind_recording(m);
}
