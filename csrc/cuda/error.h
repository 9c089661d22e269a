// What a failed CUDA call becomes: an exception that names the call and what its error means.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace mxmoe {
namespace cuda {

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws CudaError unless the call went well.
void check(cudaError_t status, const char* call);
[[noreturn]] void throw_out_of_memory(size_t bytes, const char* what);

#define MXMOE_CUDA(call) ::mxmoe::cuda::check((call), #call)

// A whole count of bytes for people: "1.50 GiB".
std::string bytes_string(size_t bytes);

}  // namespace cuda
}  // namespace mxmoe
