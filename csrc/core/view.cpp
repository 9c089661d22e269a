#include "core/view.h"

#include "core/check.h"

namespace mxmoe {
namespace {

// Two elements of an output at one address would be written twice, by different threads.
void check_rows_apart(const char* name, const Tensor& t) {
  int64_t extent = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    check_value(t.shape[i] <= 1 || t.stride[i] >= extent, name, " has a stride of ", t.stride[i],
                " elements on axis ", i, "; wanted at least ", extent, " in an array that is written");
    extent = t.stride[i] * t.shape[i];
  }
}

}  // namespace

void unsupported_dtype(const char* name, const std::string& dtype) {
  throw TypeError(concat(name, " has dtype ", dtype,
                         "; wanted float32, float64, bfloat16, int8, uint8, int32 or int64 in native byte order"));
}

void check_num_axes(const char* name, int64_t ndim) {
  check_value(ndim <= kMaxDims, name, " has ", ndim, " axes; wanted at most ", kMaxDims);
  check_value(ndim >= 1, name, " has no axes; wanted an array of at least one");
}

Tensor make_view(const char* name, DType dtype, const RawArray& raw, bool writable) {
  check_num_axes(name, raw.ndim);
  const int64_t itemsize = dtype_size(dtype);
  Tensor t;
  t.data = raw.data;
  t.dtype = dtype;
  t.ndim = static_cast<int>(raw.ndim);
  bool empty = false;
  for (int i = 0; i < t.ndim; ++i) {
    t.shape[i] = raw.shape[i];
    empty = empty || raw.shape[i] == 0;
  }
  int64_t contiguous = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    // An axis of one element may carry any stride.
    const int64_t bytes = raw.shape[i] > 1 ? raw.byte_strides[i] : contiguous * itemsize;
    t.stride[i] = empty ? contiguous : bytes / itemsize;
    check_value(empty || (bytes >= 0 && bytes % itemsize == 0), name, " has a stride of ", bytes, " bytes on axis ",
                i, "; wanted a non-negative multiple of ", itemsize);
    contiguous *= raw.shape[i];
  }
  check_value(t.stride[t.ndim - 1] == 1 || empty, name, " has a stride of ", t.stride[t.ndim - 1],
              " elements on its last axis; wanted a contiguous last axis");
  check_value(empty || reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(itemsize) == 0, name,
              " is not aligned to its items of ", itemsize, " bytes");
  if (writable && !empty) check_rows_apart(name, t);
  return t;
}

}  // namespace mxmoe
