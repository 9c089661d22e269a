#include "capi/capi.h"

#include <algorithm>
#include <cstdio>
#include <string>

#include "core/isa.h"
#include "core/scratch.h"
#include "core/thread_pool.h"
#include "core/view.h"

namespace mxmoe::capi {
namespace {

// Of fixed size, so that telling of an error cannot fail.
constexpr size_t kMaxSentence = 1024;
thread_local char last_error[kMaxSentence] = "";

DType parse_dtype(const char* name, int dtype) {
  switch (dtype) {
    case MXMOE_FLOAT32:
      return DType::f32;
    case MXMOE_FLOAT64:
      return DType::f64;
    case MXMOE_BFLOAT16:
      return DType::bf16;
    case MXMOE_INT8:
      return DType::i8;
    case MXMOE_UINT8:
      return DType::u8;
    case MXMOE_INT32:
      return DType::i32;
    case MXMOE_INT64:
      return DType::i64;
    default:
      unsupported_dtype(name, std::to_string(dtype));
  }
}

// Nothing computed from sizes and strides may overflow later on, in whatever order it is computed.
void check_sizes(const char* name, const mxmoe_tensor& t, int64_t itemsize) {
  int64_t factors[kMaxDims] = {1, 1, 1, 1};
  for (int i = 0; i < t.ndim; ++i) {
    check_value(t.shape[i] >= 0, name, " has a size of ", t.shape[i], " on axis ", i, "; wanted 0 or more");
    factors[i] = std::max<int64_t>(t.shape[i], 1);  // the sizes beside an empty axis count, too
  }
  checked_product(name, {factors[0], factors[1], factors[2], factors[3], itemsize});
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] <= 1) continue;
    const int64_t distance = t.stride[i] < 0 ? -(t.stride[i] + 1) : t.stride[i];
    checked_product(name, {distance, t.shape[i], itemsize});
  }
}

}  // namespace

int fail(int status, const char* sentence) noexcept {
  std::snprintf(last_error, kMaxSentence, "%s", sentence);
  return status;
}

Tensor required(const char* name, const mxmoe_tensor* tensor, Access access) {
  if (tensor == nullptr) throw TypeError(concat(name, " is NULL; wanted an array"));
  const mxmoe_tensor& t = *tensor;
  const DType dtype = parse_dtype(name, t.dtype);
  const int64_t itemsize = dtype_size(dtype);
  check_num_axes(name, t.ndim);
  check_sizes(name, t, itemsize);
  int64_t byte_strides[kMaxDims] = {0, 0, 0, 0};
  for (int i = 0; i < t.ndim; ++i) byte_strides[i] = t.shape[i] > 1 ? t.stride[i] * itemsize : 0;
  const Tensor view = make_view(name, dtype, {t.data, t.ndim, t.shape, byte_strides}, access == Access::kWrite);
  check_value(view.data != nullptr || view.size() == 0, name, " has shape ", shape_string(view), " but data is NULL");
  return view;
}

Tensor optional(const char* name, const mxmoe_tensor* tensor, Access access) {
  return tensor == nullptr ? Tensor{} : required(name, tensor, access);
}

Activations parse_activations(int activations) {
  switch (activations) {
    case MXMOE_ACTIVATIONS_FLOAT32:
      return Activations::f32;
    case MXMOE_ACTIVATIONS_BF16:
      return Activations::bf16;
    case MXMOE_ACTIVATIONS_INT8:
      return Activations::i8;
    default:
      throw ValueError(concat("activations is ", activations, "; wanted 0 (float32), 1 (bf16) or 2 (int8)"));
  }
}

}  // namespace mxmoe::capi

using namespace mxmoe;
using namespace mxmoe::capi;

const char* mxmoe_version(void) { return MXMOE_VERSION; }

int mxmoe_check_abi(int abi_version) {
  return guarded([&] {
    check_value(abi_version == MXMOE_ABI_VERSION, "abi_version is ", abi_version, "; wanted ", MXMOE_ABI_VERSION,
                ", that of mxmoe ", MXMOE_VERSION);
  });
}

const char* mxmoe_last_error(void) { return last_error; }

int mxmoe_set_num_threads(int num_threads) {
  return guarded([&] { set_num_threads(num_threads); });
}

int mxmoe_get_num_threads(int* num_threads) {
  return guarded([&] { pointed("num_threads", num_threads) = current_num_threads(); });
}

int mxmoe_set_isa(const char* name) {
  return guarded([&] { set_isa(&pointed("name", name)); });
}

int mxmoe_get_isa(const char** name) {
  return guarded([&] { pointed("name", name) = active_isa().name; });
}

int mxmoe_has_isa(const char* name, int* has) {
  return guarded([&] { pointed("has", has) = has_isa(&pointed("name", name)); });
}

int mxmoe_last_kernel(const char* table, const char** name) {
  return guarded([&] {
    const std::string wanted = &pointed("table", table);
    std::string known;
    for (const DispatchBase* each : DispatchBase::all()) {
      known += (known.empty() ? "" : ", ") + std::string(each->op());
      if (wanted != each->op()) continue;
      pointed("name", name) = each->last();
      return;
    }
    throw ValueError(concat("table is '", wanted, "'; wanted one of ", known));
  });
}
