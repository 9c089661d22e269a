#include "cuda/error.h"

#include <cstdio>
#include <cstring>

#include "core/check.h"

namespace mxmoe {
namespace cuda {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that was reported must not be found again by the next call
  // "cudaMalloc(&p, n)" is named by its function: the arguments are ours, not the reader's.
  const char* end = std::strchr(call, '(');
  const std::string function(call, end != nullptr ? static_cast<size_t>(end - call) : std::strlen(call));
  throw CudaError(concat(function, " failed with ", cudaGetErrorName(status), ": ", cudaGetErrorString(status)));
}

std::string bytes_string(size_t bytes) {
  const char* const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  for (; value >= 1024.0 && unit + 1 < sizeof units / sizeof *units; ++unit) value /= 1024.0;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
  return text;
}

void throw_out_of_memory(size_t bytes, const char* what) {
  cudaGetLastError();
  size_t free_bytes = 0, total_bytes = 0;
  const bool known = cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess;
  throw OutOfMemory(concat("the GPU has no room for ", what, ": wanted ", bytes_string(bytes), ", free ",
                           known ? bytes_string(free_bytes) + " of " + bytes_string(total_bytes) : "unknown"));
}

}  // namespace cuda
}  // namespace mxmoe
