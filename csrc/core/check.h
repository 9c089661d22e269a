// Argument errors: one sentence that names the argument, what came and what was wanted.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/types.h"

namespace mxmoe {

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ValueError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (void)std::initializer_list<int>{((text << parts), 0)...};
  return text.str();
}

template <typename... Parts>
void check_value(bool ok, const Parts&... parts) {
  if (!ok) throw ValueError(concat(parts...));
}

std::string shape_string(const Tensor& t);

// A dimension of -1 in `shape` accepts any size.
void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, const char* meaning);
void check_dtype(const char* name, const Tensor& t, std::initializer_list<DType> allowed);
// Every stride is the product of the sizes behind it.
void check_contiguous(const char* name, const Tensor& t);
// Two arrays share no byte (empty arrays never overlap).
bool overlaps(const Tensor& a, const Tensor& b);
void check_no_overlap(const char* out_name, const Tensor& out, const char* in_name, const Tensor& in);
struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};
void check_no_overlap(const char* out_name, const Tensor& out, std::initializer_list<NamedTensor> others);

}  // namespace mxmoe
