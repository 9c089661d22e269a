#include "bindings/tensor.h"

#include <memory>

#include "core/check.h"
#include "core/view.h"

namespace mxmoe {
namespace {

// What every source of arrays is reduced to before the common checks. Strides in bytes.
struct Raw {
  void* data;
  int64_t ndim;
  const py::ssize_t* shape;
  const py::ssize_t* byte_strides;
};

std::string type_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

// ml_dtypes registers bfloat16 with NumPy under a number that is known only at run time.
int bf16_type_num() {
  static const int num = py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16")).num();
  return num;
}

bool parse_dtype(char kind, int64_t bytes, DType* dtype) {
  if (kind == 'f' && bytes == 4) return *dtype = DType::f32, true;
  if (kind == 'f' && bytes == 8) return *dtype = DType::f64, true;
  if (kind == 'i' && bytes == 1) return *dtype = DType::i8, true;
  if (kind == 'i' && bytes == 4) return *dtype = DType::i32, true;
  if (kind == 'i' && bytes == 8) return *dtype = DType::i64, true;
  if (kind == 'u' && bytes == 1) return *dtype = DType::u8, true;
  return false;
}

void fill(Tensor& t, const char* name, const Raw& raw, bool writable) {
  check_num_axes(name, raw.ndim);
  int64_t shape[kMaxDims], byte_strides[kMaxDims];
  for (int64_t i = 0; i < raw.ndim; ++i) shape[i] = raw.shape[i], byte_strides[i] = raw.byte_strides[i];
  t = make_view(name, t.dtype, {raw.data, raw.ndim, shape, byte_strides}, writable);
}

void from_numpy(Tensor& t, py::handle object, const char* name, bool writable) {
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  const bool native = dtype.byteorder() == '=' || dtype.byteorder() == '|';
  if (dtype.num() == bf16_type_num()) {
    t.dtype = DType::bf16;
  } else if (!native || !parse_dtype(dtype.kind(), dtype.itemsize(), &t.dtype)) {
    unsupported_dtype(name, py::str(dtype));
  }
  check_value(!writable || array.writeable(), name, " is read-only; wanted a writable array");
  fill(t, name, {const_cast<void*>(array.data()), array.ndim(), array.shape(), array.strides()}, writable);
}

DType from_dlpack_dtype(const char* name, dlpack::DataType type) {
  DType dtype;
  if (type.code == dlpack::kBfloat && type.bits == 16 && type.lanes == 1) return DType::bf16;
  const char kind = type.code == dlpack::kFloat ? 'f' : type.code == dlpack::kInt ? 'i' : 'u';
  const bool known = type.code <= dlpack::kFloat && type.lanes == 1;
  if (known && parse_dtype(kind, type.bits / 8, &dtype) && type.bits % 8 == 0) return dtype;
  unsupported_dtype(name, concat("DLPack code ", int{type.code}, " with ", int{type.bits}, " bits"));
}

void check_device(py::handle object, const char* name) {
  const py::object device = object.attr("__dlpack_device__")();
  if (!py::isinstance<py::tuple>(device) || py::len(device) != 2) {
    throw TypeError(concat(name, " names no DLPack device; wanted a pair of numbers"));
  }
  const auto type = py::cast<int32_t>(py::int_(device[py::int_(0)]));
  check_value(type == dlpack::kCpu || type == dlpack::kCudaHost, name, " is on DLPack device type ", type,
              "; wanted an array in CPU memory");
}

py::object export_capsule(py::handle object) {
  const py::object method = object.attr("__dlpack__");
  try {
    return method(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // producers from before DLPack 1.0 do not know the keyword
  }
  return method();
}

// What a producer raises says nothing about which argument it was.
void export_dlpack(py::object& owner, py::handle object, const char* name) {
  try {
    check_device(object, name);
    owner = export_capsule(object);
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // Ctrl-C stays what it is
    throw ValueError(concat(name, " cannot be read through DLPack: ", std::string(py::str(error.value()))));
  }
}

void from_dlpack_array(Tensor& t, const dlpack::Array& array, const char* name, bool writable) {
  check_value(array.device.type == dlpack::kCpu || array.device.type == dlpack::kCudaHost, name,
              " is not in CPU memory");
  t = dlpack_tensor(array, name, writable);
}

// The capsule stays ours unconsumed: when it is dropped, its own destructor frees the export.
void from_dlpack(Tensor& t, py::object& owner, py::handle object, const char* name, bool writable) {
  export_dlpack(owner, object, name);
  const dlpack::Array* array = nullptr;
  if (PyCapsule_IsValid(owner.ptr(), "dltensor_versioned")) {
    const auto* managed =
        static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(owner.ptr(), "dltensor_versioned"));
    check_value(managed->version.major == 1, name, " exports DLPack version ", managed->version.major, "; wanted 1");
    check_value(!writable || (managed->flags & dlpack::kReadOnly) == 0, name,
                " is read-only; wanted a writable array");
    array = &managed->array;
  } else if (PyCapsule_IsValid(owner.ptr(), "dltensor")) {
    array = &static_cast<dlpack::Managed*>(PyCapsule_GetPointer(owner.ptr(), "dltensor"))->array;
  } else {
    throw TypeError(concat(name, " exports something that is no DLPack capsule"));
  }
  from_dlpack_array(t, *array, name, writable);
}

const dlpack::ExchangeApi* exchange_api(py::handle object) {
  static PyObject* const attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  const auto capsule = py::reinterpret_steal<py::object>(
      PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), attribute));
  if (!capsule || !PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    PyErr_Clear();  // a type without it
    return nullptr;
  }
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return api->version.major == 1 ? api : nullptr;
}

bool needs_gradient(py::handle object) {
  static PyObject* const attribute = PyUnicode_InternFromString("requires_grad");
  const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), attribute));
  if (!value) PyErr_Clear();
  return value.ptr() == Py_True;
}

struct DropExport {
  void operator()(dlpack::ManagedVersioned* managed) const {
    if (managed->deleter != nullptr) managed->deleter(managed);
  }
};

// The same array as from_dlpack where the type offers it, without a call of __dlpack__, which takes longer than an
// op on one token. False for whatever is out of the ordinary, so that its errors come from one place.
bool from_exchange_api(Tensor& t, py::handle object, const char* name, bool writable) {
  const dlpack::ExchangeApi* api = exchange_api(object);
  // __dlpack__ refuses what a gradient must be computed of; the table does not.
  if (api == nullptr || needs_gradient(object)) return false;
  dlpack::Array array{};
  std::unique_ptr<dlpack::ManagedVersioned, DropExport> managed;
  if (!writable && api->view != nullptr) {
    if (api->view(object.ptr(), &array) != 0) return PyErr_Clear(), false;
  } else {  // which alone tells whether it may be written
    dlpack::ManagedVersioned* exported = nullptr;
    if (api->managed(object.ptr(), &exported) != 0 || exported == nullptr) return PyErr_Clear(), false;
    managed.reset(exported);
    if (exported->flags & dlpack::kReadOnly) return false;
    array = exported->array;
  }
  if (array.device.type != dlpack::kCpu) return false;
  from_dlpack_array(t, array, name, writable);
  return true;
}

void from_buffer(Tensor& t, py::object& owner, py::handle object, const char* name, bool writable) {
  // Through NumPy, which understands every buffer format and keeps the exporter alive.
  owner = py::module_::import("numpy").attr("asarray")(object);
  from_numpy(t, owner, name, writable);
}

}  // namespace

Tensor dlpack_tensor(const dlpack::Array& array, const char* name, bool writable) {
  Tensor t;
  t.dtype = from_dlpack_dtype(name, array.dtype);
  check_value(array.ndim >= 0 && array.ndim <= kMaxDims, name, " has ", array.ndim, " axes; wanted at most ",
              kMaxDims);
  py::ssize_t shape[kMaxDims], strides[kMaxDims];
  int64_t contiguous = dtype_size(t.dtype);
  for (int i = array.ndim - 1; i >= 0; --i) {
    shape[i] = array.shape[i];
    strides[i] = array.strides != nullptr ? array.strides[i] * dtype_size(t.dtype) : contiguous;
    contiguous *= array.shape[i];
  }
  fill(t, name, {static_cast<char*>(array.data) + array.byte_offset, array.ndim, shape, strides}, writable);
  return t;
}

TensorArg to_tensor(py::handle object, const char* name, bool writable) {
  TensorArg arg;
  if (object.is_none()) return arg;
  arg.owner_ = py::reinterpret_borrow<py::object>(object);
  if (py::isinstance<py::array>(object)) {
    from_numpy(arg.tensor_, object, name, writable);
  } else if (from_exchange_api(arg.tensor_, object, name, writable)) {
    return arg;
  } else if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    from_dlpack(arg.tensor_, arg.owner_, object, name, writable);
  } else if (PyObject_CheckBuffer(object.ptr())) {
    from_buffer(arg.tensor_, arg.owner_, object, name, writable);
  } else {
    throw TypeError(
        concat(name, " is of type ", type_name(object), "; wanted an array with DLPack or the buffer protocol"));
  }
  return arg;
}

TensorDescription describe(py::handle object, const char* name) {
  const TensorArg arg = required(object, name);
  const Tensor& t = arg;
  py::tuple shape(t.ndim);
  for (int i = 0; i < t.ndim; ++i) shape[static_cast<size_t>(i)] = t.shape[i];
  return py::make_tuple(shape, dtype_name(t.dtype));
}

TensorArg required(py::handle object, const char* name, bool writable) {
  if (object.is_none()) throw TypeError(concat(name, " is None; wanted an array"));
  return to_tensor(object, name, writable);
}

Activations parse_activations(const std::string& name) {
  if (name == "float32") return Activations::f32;
  if (name == "bf16") return Activations::bf16;
  if (name == "int8") return Activations::i8;
  throw ValueError(concat("activations is '", name, "'; wanted 'float32', 'bf16' or 'int8'"));
}

}  // namespace mxmoe
