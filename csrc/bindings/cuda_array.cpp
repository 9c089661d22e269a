#include "bindings/cuda_array.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <atomic>

#include "core/check.h"
#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/graph.h"
#include "cuda/upload.h"

namespace mxmoe {
namespace cuda {
namespace {

#if defined(MXMOE_CUDA_EMULATION)
constexpr int kFirstOverlappingMajor = 8;  // what is launched so can be seen there, too
#else
constexpr int kFirstOverlappingMajor = 9;
#endif

constexpr const char* kVersioned = "dltensor_versioned";
constexpr const char* kUnversioned = "dltensor";

DType parse_dtype_name(const std::string& name) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::i8, DType::u8, DType::i32, DType::i64}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw ValueError(concat("dtype is '", name, "'; wanted float32, float64, bfloat16, int8, uint8, int32 or int64"));
}

py::dtype numpy_dtype(DType dtype) {
  if (dtype == DType::bf16) return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  return py::dtype(dtype_name(dtype));
}

// Owns a consumed export.
template <typename Managed>
std::shared_ptr<void> keep(Managed* managed) {
  return std::shared_ptr<void>(managed, [](void* p) {
    auto* m = static_cast<Managed*>(p);
    if (m->deleter != nullptr) m->deleter(m);
  });
}

DeviceArray wrap(const dlpack::Array& array, std::shared_ptr<void> owner, const char* name, bool writable) {
  check_value(array.device.type == dlpack::kCuda || array.device.type == dlpack::kCudaManaged, name,
              " is on DLPack device type ", array.device.type, "; wanted an array on a CUDA device");
  DeviceArray result;
  result.tensor = dlpack_tensor(array, name, writable);
  result.device = array.device.id;
  result.owner = std::move(owner);
  return result;
}

py::object exported_by(Stream& stream, py::handle object) {
  const py::object method = object.attr("__dlpack__");
  // Protocol: the number of a stream is its handle; the producer makes that stream wait.
  const auto number = reinterpret_cast<intptr_t>(stream.handle());
  try {
    return method(py::arg("stream") = number, py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // producers from before DLPack 1.0
  }
  return method(py::arg("stream") = number);
}

// An array in host memory is told so here, whatever its own __dlpack__ says of streams.
void check_on_device(py::handle object, const char* name) {
  const py::object device = object.attr("__dlpack_device__")();
  const auto type = py::cast<int32_t>(py::int_(py::object(device[py::int_(0)])));
  check_value(type == dlpack::kCuda || type == dlpack::kCudaManaged, name, " is on DLPack device type ", type,
              "; wanted an array on a CUDA device");
}

DeviceArray import_array(Stream& stream, py::handle object, const char* name, bool writable) {
  py::object capsule;
  try {
    check_on_device(object, name);
    capsule = exported_by(stream, object);
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
    throw ValueError(concat(name, " cannot be read through DLPack: ", std::string(py::str(error.value()))));
  }
  if (PyCapsule_IsValid(capsule.ptr(), kVersioned)) {
    auto* managed = static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), kVersioned));
    check_value(managed->version.major == 1, name, " exports DLPack version ", managed->version.major, "; wanted 1");
    const bool read_only = (managed->flags & dlpack::kReadOnly) != 0;
    check_value(!writable || !read_only, name, " is read-only; wanted a writable array");
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    DeviceArray result = wrap(managed->array, keep(managed), name, writable);
    result.read_only = read_only;
    return result;
  }
  if (!PyCapsule_IsValid(capsule.ptr(), kUnversioned)) {
    throw TypeError(concat(name, " exports something that is no DLPack capsule"));
  }
  auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), kUnversioned));
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  return wrap(managed->array, keep(managed), name, writable);
}

void drop_versioned(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kVersioned)) return;
  auto* managed = static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule, kVersioned));
  managed->deleter(managed);
}
void drop_unversioned(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kUnversioned)) return;
  auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule, kUnversioned));
  managed->deleter(managed);
}

// 1 is the legacy default stream, 2 the calling thread's.
cudaStream_t stream_of(intptr_t number) {
  if (number == 1) return cudaStreamLegacy;
  return number == 2 ? cudaStreamPerThread : reinterpret_cast<cudaStream_t>(number);
}

// None is the legacy default stream; -1 asks for no order at all.
void order_consumer(const py::object& stream) {
  const intptr_t number = stream.is_none() ? 1 : py::cast<intptr_t>(stream);
  check_value(number == -1 || number > 0, "stream is ", number, "; wanted -1, or the number of a stream above 0");
  if (number != -1) Stream::current()->let_wait(stream_of(number));
}

py::capsule dlpack_capsule(const DeviceArray& array, const py::object& stream, const py::object& max_version,
                           const py::object& dl_device, const py::object& copy) {
  check_value(copy.is_none() || !py::cast<bool>(copy),
              "copy is True; wanted None or False: arrays are exported as they are");
  if (!dl_device.is_none()) {
    const auto wanted = py::cast<std::pair<int32_t, int32_t>>(dl_device);
    check_value(wanted.first == dlpack::kCuda && wanted.second == array.device, "dl_device is (", wanted.first, ", ",
                wanted.second, "); the array is on (", dlpack::kCuda, ", ", array.device, ")");
  }
  order_consumer(stream);
  const bool versioned = !max_version.is_none() && py::cast<std::pair<int, int>>(max_version).first >= 1;
  if (versioned) return py::capsule(export_versioned(array), kVersioned, drop_versioned);
  return py::capsule(export_unversioned(array), kUnversioned, drop_unversioned);
}

// Named as an object: a stub would otherwise speak of numpy without importing it.
py::object to_numpy(const DeviceArray& array) {
  const Tensor& t = array.tensor;
  py::array host(numpy_dtype(t.dtype), std::vector<py::ssize_t>(t.shape, t.shape + t.ndim));
  void* data = host.mutable_data();
  const auto stream = Stream::current();
  const OpScope scope(*stream);
  to_host(*stream, array, data);
  return host;
}

// A host array's layout must be the device's: contiguous.
TensorArg host_arg(const py::object& object, const char* name) {
  TensorArg arg = required(object, name);
  check_contiguous(name, arg);
  return arg;
}

void check_same(const Tensor& host, const Tensor& device) {
  bool same = host.ndim == device.ndim && host.dtype == device.dtype;
  for (int i = 0; same && i < host.ndim; ++i) same = host.shape[i] == device.shape[i];
  check_value(same, "array is ", dtype_name(host.dtype), " of shape ", shape_string(host), "; wanted ",
              dtype_name(device.dtype), " of shape ", shape_string(device));
}

using ShapeTuple = py::typing::Tuple<py::int_, py::ellipsis>;

ShapeTuple shape_of(const DeviceArray& array) {
  py::tuple shape(array.tensor.ndim);
  for (int i = 0; i < array.tensor.ndim; ++i) shape[static_cast<size_t>(i)] = array.tensor.shape[i];
  return shape;
}

// Slices of the leading axes, without steps.
DeviceArray slice(const DeviceArray& array, const py::object& key) {
  const py::tuple parts =
      py::isinstance<py::tuple>(key) ? py::reinterpret_borrow<py::tuple>(key) : py::make_tuple(key);
  check_value(parts.size() <= static_cast<size_t>(array.tensor.ndim), "an array of ", array.tensor.ndim,
              " axes is indexed by ", parts.size());
  DeviceArray view = array;
  int64_t offset = 0;
  for (int i = 0; i < static_cast<int>(parts.size()); ++i) {
    const py::object part = parts[static_cast<size_t>(i)];
    if (!py::isinstance<py::slice>(part)) throw TypeError("an array on the GPU is indexed by slices alone");
    py::ssize_t begin, end, step, count;
    if (!py::reinterpret_borrow<py::slice>(part).compute(array.tensor.shape[i], &begin, &end, &step, &count)) {
      throw py::error_already_set();
    }
    check_value(step == 1, "a slice has a step of ", step, "; wanted 1");
    view.tensor.shape[i] = count;
    offset += begin * array.tensor.stride[i];
  }
  view.tensor.data = static_cast<char*>(array.tensor.data) + offset * dtype_size(array.tensor.dtype);
  return view;
}

// Where a thread's new arrays come from; null for the device itself.
thread_local std::shared_ptr<Pool> current_pool;

DeviceArray new_array(const std::vector<int64_t>& shape, DType dtype, const char* what) {
  return current_pool ? allocate(*current_pool, shape, dtype, what) : allocate(Stream::current(), shape, dtype, what);
}

std::vector<int64_t> sizes(const py::args& args) {
  const bool one_tuple = args.size() == 1 && !py::isinstance<py::int_>(args[0]);
  return py::cast<std::vector<int64_t>>(one_tuple ? py::object(args[0]) : py::object(args));
}

void bind_streams(py::module_& m) {
  py::class_<Stream, std::shared_ptr<Stream>>(m, "Stream", py::module_local())
      .def(py::init<int>(), py::arg("device") = 0)
      .def_property_readonly("device", &Stream::device)
      .def_property_readonly("handle", [](const Stream& s) { return reinterpret_cast<intptr_t>(s.handle()); })
      .def("synchronize", &Stream::synchronize, py::call_guard<py::gil_scoped_release>())
      // Whether the kernels given to it may begin before those ahead have ended; false where the device cannot.
      .def_property("overlaps", &Stream::overlaps,
                    [](Stream& s, bool wanted) {
                      const std::lock_guard<std::mutex> lock(s.mutex());
                      s.set_overlaps(wanted && device(s.device()).major >= kFirstOverlappingMajor);
                    })
      .def(
          "wait_for", [](Stream& s, const Stream& other) { s.wait_for(other.handle()); }, py::arg("other"))
      // Another library's stream, by its handle, waits for this one; 0 is the legacy default stream.
      .def("let_wait", [](Stream& s, intptr_t handle) { s.let_wait(stream_of(handle)); }, py::arg("handle"));
  m.def("current_stream", &Stream::current);
  m.def("set_current_stream", &Stream::set_current, py::arg("stream").none(true));
  py::class_<Event>(m, "Event", py::module_local())
      .def(py::init<bool>(), py::arg("timing") = true)
      .def("record", [](Event& e) { e.record(Stream::current()->handle()); })
      .def("synchronize", &Event::synchronize, py::call_guard<py::gil_scoped_release>())
      .def("milliseconds_since", &Event::milliseconds_since, py::arg("earlier"));
  py::class_<Graph>(m, "Graph", py::module_local())
      .def(py::init([] { return std::make_unique<Graph>(Stream::current()); }))
      .def("begin", &Graph::begin)
      .def("end", &Graph::end)
      .def("abandon", &Graph::abandon)
      .def("replay", &Graph::replay)
      .def_property_readonly("num_nodes", &Graph::num_nodes)
      .def_property_readonly("num_overlaps", &Graph::num_overlaps);
}

// Host memory that kernels read and write where it is, of a few values: its host sees what a kernel wrote once it has
// waited for an event behind that kernel.
class Pinned {
 public:
  Pinned(const std::vector<int64_t>& shape, DType dtype) : stream_(Stream::current()) {
    array_ = host_array(stream_, shape, dtype, "pinned memory");
  }
  const DeviceArray& array() const { return array_; }
  py::array host() const {
    const Tensor& t = array_.tensor;
    auto* kept = new std::shared_ptr<void>(array_.owner);
    const py::capsule base(kept, [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
    return py::array(numpy_dtype(t.dtype), std::vector<py::ssize_t>(t.shape, t.shape + t.ndim), t.data, base);
  }

 private:
  std::shared_ptr<Stream> stream_;
  DeviceArray array_;
};

// How often a host array has been copied into one on the device, all together: who has computed ahead sees by it
// that something may have changed.
std::atomic<uint64_t> host_writes{0};

void bind_memory(py::module_& m) {
  py::class_<Pinned>(m, "Pinned", py::module_local())
      .def(py::init([](const std::vector<int64_t>& shape, const std::string& dtype) {
             return std::make_unique<Pinned>(shape, parse_dtype_name(dtype));
           }),
           py::arg("shape"), py::arg("dtype"))
      .def_property_readonly("array", &Pinned::array)
      .def_property_readonly("host", [](const Pinned& p) -> py::object { return p.host(); });
  m.def("host_writes", [] { return host_writes.load(); });
  py::class_<Arena, std::shared_ptr<Arena>>(m, "Arena", py::module_local())
      .def(py::init([](size_t chunk_bytes, const std::string& name) {
             return std::make_shared<Arena>(Stream::current(), chunk_bytes, name);
           }),
           py::arg("chunk_bytes") = size_t{256} << 20, py::arg("name") = "the arena")
      .def(
          "empty",
          [](const std::shared_ptr<Arena>& arena, const std::vector<int64_t>& shape, const std::string& dtype,
             const std::string& what) {
            return allocate(arena, Stream::current()->device(), shape, parse_dtype_name(dtype), what.c_str());
          },
          py::arg("shape"), py::arg("dtype"), py::arg("what") = "an array")
      .def_property_readonly("allocated_bytes", &Arena::allocated_bytes)
      .def_property_readonly("used_bytes", &Arena::used_bytes);
  py::class_<Pool, std::shared_ptr<Pool>>(m, "Pool", py::module_local())
      .def(py::init([] { return std::make_shared<Pool>(Stream::current()); }))
      .def_property_readonly("allocated_bytes", &Pool::allocated_bytes);
  m.def("current_pool", [] { return current_pool; });
  m.def(
      "set_current_pool", [](std::shared_ptr<Pool> pool) { current_pool = std::move(pool); },
      py::arg("pool").none(true));
  py::class_<Uploader>(m, "Uploader", py::module_local())
      .def(py::init([](size_t buffer_bytes) { return std::make_unique<Uploader>(Stream::current(), buffer_bytes); }),
           py::arg("buffer_bytes") = Uploader::kDefaultBytes)
      .def(
          "copy",
          [](Uploader& uploader, const DeviceArray& to, const py::object& array) {
            const TensorArg host = host_arg(array, "array");
            check_same(host, to.tensor);
            check_contiguous("to", to.tensor);
            check_value(!to.read_only, "to is read-only; wanted a writable array");
            const Tensor& t = host;
            const py::gil_scoped_release unlocked;
            uploader.copy(to.tensor.data, t.data, static_cast<size_t>(t.size() * dtype_size(t.dtype)));
          },
          py::arg("to"), py::arg("array"));
}

}  // namespace

DeviceArg device_arg(Stream& stream, py::handle object, const char* name, bool writable) {
  if (object.is_none()) return DeviceArg();
  DeviceArray array;
  if (py::isinstance<DeviceArray>(object)) {
    array = py::cast<DeviceArray>(object);
    check_value(!writable || !array.read_only, name, " is read-only; wanted a writable array");
  } else if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    array = import_array(stream, object, name, writable);
  } else {
    throw TypeError(concat(name, " is of type ", std::string(py::str(py::type::handle_of(object).attr("__name__"))),
                           "; wanted an array on the GPU"));
  }
  check_value(array.device == stream.device(), name, " is on device ", array.device, "; the stream is on device ",
              stream.device());
  return DeviceArg(std::move(array));
}

DeviceArg required_on_device(Stream& stream, py::handle object, const char* name, bool writable) {
  if (object.is_none()) throw TypeError(concat(name, " is None; wanted an array on the GPU"));
  return device_arg(stream, object, name, writable);
}

void bind_array(py::module_& m) {
  bind_streams(m);
  py::class_<DeviceArray>(m, "DeviceArray", py::module_local())
      .def_property_readonly("shape", &shape_of)
      .def_property_readonly("dtype", [](const DeviceArray& a) { return dtype_name(a.tensor.dtype); })
      .def_property_readonly("ndim", [](const DeviceArray& a) { return a.tensor.ndim; })
      .def_property_readonly("size", [](const DeviceArray& a) { return a.tensor.size(); })
      .def_property_readonly("nbytes",
                             [](const DeviceArray& a) { return a.tensor.size() * dtype_size(a.tensor.dtype); })
      .def_property_readonly("device", [](const DeviceArray& a) { return a.device; })
      .def_property_readonly("data_ptr",
                             [](const DeviceArray& a) { return reinterpret_cast<intptr_t>(a.tensor.data); })
      .def_readwrite("read_only", &DeviceArray::read_only)
      .def("__len__", [](const DeviceArray& a) { return a.tensor.shape[0]; })
      .def("__getitem__", &slice, py::arg("key"))
      .def("reshape",
           [](const DeviceArray& a, const py::Args<py::object>& shape) { return reshape(a, sizes(shape)); })
      .def("numpy", &to_numpy)
      .def("copy",
           [](const DeviceArray& a) {
             const std::vector<int64_t> shape(a.tensor.shape, a.tensor.shape + a.tensor.ndim);
             DeviceArray made = new_array(shape, a.tensor.dtype, "a copy");
             const auto stream = Stream::current();
             const OpScope scope(*stream);
             copy_on_device(*stream, a, made);
             return made;
           })
      .def(
          "set",
          [](const DeviceArray& a, const py::object& array) {
            const auto stream = Stream::current();
            if (py::isinstance<DeviceArray>(array)) {
              const DeviceArg from = device_arg(*stream, array, "array");
              check_same(from, a.tensor);
              check_value(!a.read_only, "the array is read-only; wanted a writable one");
              check_contiguous("what is set", a.tensor);
              check_no_overlap("what is set", a.tensor, "array", from);
              const OpScope scope(*stream);
              ++host_writes;
              return copy_on_device(*stream, from.array(), a);
            }
            const TensorArg host = host_arg(array, "array");
            check_same(host, a.tensor);
            const OpScope scope(*stream);
            ++host_writes;
            from_host(*stream, a, (*host).data);
          },
          py::arg("array"))
      .def("__dlpack__", &dlpack_capsule, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__",
           [](const DeviceArray& a) -> py::typing::Tuple<py::int_, py::int_> {
             return py::make_tuple(int{dlpack::kCuda}, a.device);
           })
      .def("__repr__", [](const DeviceArray& a) {
        return concat("DeviceArray(shape=", shape_string(a.tensor), ", dtype=", dtype_name(a.tensor.dtype),
                      ", device=", a.device, ")");
      });
  m.def(
      "empty",
      [](const std::vector<int64_t>& shape, const std::string& dtype, const std::string& what) {
        return new_array(shape, parse_dtype_name(dtype), what.c_str());
      },
      py::arg("shape"), py::arg("dtype"), py::arg("what") = "an array");
  m.def(
      "from_dlpack", [](const py::object& array) { return import_array(*Stream::current(), array, "array", false); },
      py::arg("array"));
  bind_memory(m);
}

}  // namespace cuda
}  // namespace mxmoe
