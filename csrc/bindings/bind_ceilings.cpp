#include <pybind11/pybind11.h>

#include <string>

#include "bindings/bind.h"
#include "bindings/tensor.h"
#include "ops/ceilings/ceilings.h"

namespace mxmoe {

void bind_ceilings(py::module_& m) {
  using Release = py::call_guard<Unlocked>;
  py::class_<ReadBuffer>(m, "ReadBuffer", py::module_local())
      .def(py::init<int64_t>(), Release(), py::arg("num_bytes"))
      .def_property_readonly("nbytes", &ReadBuffer::size)
      .def("read_seconds", &ReadBuffer::read_seconds, Release());
  // (operations, seconds)
  m.def(
      "run_peak",
      [](const std::string& activations, int64_t rounds) {
        const Activations format = parse_activations(activations);
        PeakRun run;
        {
          const Unlocked unlocked;
          run = run_peak(format, rounds);
        }
        return py::typing::Tuple<py::float_, py::float_>(py::make_tuple(run.operations, run.seconds));
      },
      py::arg("activations"), py::arg("rounds"));
}

}  // namespace mxmoe
