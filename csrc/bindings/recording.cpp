#include "bindings/recording.h"

#include <chrono>

#include "core/check.h"

namespace mxmoe {
namespace {

thread_local Recording* recording_now = nullptr;

constexpr std::chrono::milliseconds kDeaf{20};  // the longest that signals go unseen, but for the op at the end

}  // namespace

Recording* Recording::current() { return recording_now; }

void Recording::begin() {
  check_value(recording_now == nullptr, "this thread is recording already; wanted one recording at a time");
  recording_now = this;
}

void Recording::end() {
  if (recording_now == this) recording_now = nullptr;
}

void Recording::replay() const {
  check_value(recording_now != this, "the recording is still being made; wanted it ended before it is replayed");
  for (size_t i = 0; i < ops_.size();) {
    {
      const Unlocked unlocked;
      const auto begin = std::chrono::steady_clock::now();
      while (i < ops_.size() && std::chrono::steady_clock::now() - begin < kDeaf) ops_[i++]();
    }
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }
}

void bind_recording(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Recording>(m, "Recording", py::module_local())
      .def(py::init<>())
      .def(
          "__enter__",
          [](Recording& self) -> Recording& {
            self.begin();
            return self;
          },
          py::return_value_policy::reference_internal)
      .def(
          "__exit__", [](Recording& self, const py::object&, const py::object&, const py::object&) { self.end(); },
          py::arg("exc_type"), py::arg("exc_value"), py::arg("traceback"))
      .def("__len__", &Recording::size)
      .def("replay", &Recording::replay);
}

}  // namespace mxmoe
