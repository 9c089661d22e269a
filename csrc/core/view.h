// From what a caller says about an array to a Tensor: the checks that every front end makes, in the same words.
#pragma once

#include <cstdint>
#include <string>

#include "core/types.h"

namespace mxmoe {

// Any array, before it is checked. Strides in bytes.
struct RawArray {
  void* data;
  int64_t ndim;
  const int64_t* shape;
  const int64_t* byte_strides;
};

[[noreturn]] void unsupported_dtype(const char* name, const std::string& dtype);
void check_num_axes(const char* name, int64_t ndim);

// Throws ValueError naming the argument unless it has one to four axes, the last one contiguous, no negative strides,
// aligned items, and, where it is `writable`, no two items at one address. Empty arrays may have any strides.
Tensor make_view(const char* name, DType dtype, const RawArray& raw, bool writable);

}  // namespace mxmoe
