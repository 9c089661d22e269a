#include "core/check.h"

namespace mxmoe {

std::string shape_string(const Tensor& t) {
  std::string text = "(";
  for (int i = 0; i < t.ndim; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(t.shape[i]);
  }
  return text + (t.ndim == 1 ? ",)" : ")");
}

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, const char* meaning) {
  bool ok = t.ndim == static_cast<int>(shape.size());
  std::string wanted = "(";
  int axis = 0;
  for (int64_t dim : shape) {
    if (ok && dim >= 0 && t.shape[axis] != dim) ok = false;
    if (axis > 0) wanted += ", ";
    wanted += dim < 0 ? "any" : std::to_string(dim);
    ++axis;
  }
  if (ok) return;
  wanted += shape.size() == 1 ? ",)" : ")";
  throw ValueError(concat(name, " has shape ", shape_string(t), "; wanted ", meaning, " = ", wanted));
}

void check_dtype(const char* name, const Tensor& t, std::initializer_list<DType> allowed) {
  std::string wanted;
  for (DType dtype : allowed) {
    if (t.dtype == dtype) return;
    if (!wanted.empty()) wanted += " or ";
    wanted += dtype_name(dtype);
  }
  throw TypeError(concat(name, " has dtype ", dtype_name(t.dtype), "; wanted ", wanted));
}

void check_contiguous(const char* name, const Tensor& t) {
  if (t.size() == 0) return;
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.stride[i] != expected) {
      throw ValueError(concat(name, " is not contiguous: axis ", i, " has a stride of ", t.stride[i],
                              " elements; wanted ", expected));
    }
    expected *= t.shape[i];
  }
}

namespace {
// Bytes from the first to one past the last element.
int64_t extent(const Tensor& t) {
  if (!t || t.size() == 0) return 0;
  int64_t last = 0;
  for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.stride[i];
  return (last + 1) * dtype_size(t.dtype);
}
}  // namespace

bool overlaps(const Tensor& a, const Tensor& b) {
  const int64_t size_a = extent(a), size_b = extent(b);
  if (size_a == 0 || size_b == 0) return false;
  const auto begin_a = reinterpret_cast<uintptr_t>(a.data), begin_b = reinterpret_cast<uintptr_t>(b.data);
  return begin_a < begin_b + static_cast<uintptr_t>(size_b) && begin_b < begin_a + static_cast<uintptr_t>(size_a);
}

void check_no_overlap(const char* out_name, const Tensor& out, const char* in_name, const Tensor& in) {
  check_value(!overlaps(out, in), out_name, " shares memory with ", in_name, "; wanted separate arrays");
}

void check_no_overlap(const char* out_name, const Tensor& out, std::initializer_list<NamedTensor> others) {
  for (const NamedTensor& other : others) check_no_overlap(out_name, out, other.name, other.tensor);
}

}  // namespace mxmoe
