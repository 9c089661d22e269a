#include "cuda/launch.h"

#include "cuda/kernel_record.h"

namespace mxmoe {
namespace cuda {

void throw_launch_error(cudaError_t status, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const char* name = nullptr;
  if (cudaFuncGetName(&name, kernel) != cudaSuccess || name == nullptr) name = "a kernel";
  cudaGetLastError();
  throw CudaError(concat("the launch of ", name, " with (", grid.x, ", ", grid.y, ", ", grid.z, ") blocks of ",
                         block.x * block.y * block.z, " threads and ", bytes_string(shared_bytes),
                         " of shared memory failed with ", cudaGetErrorName(status), ": ",
                         cudaGetErrorString(status)));
}

namespace {
std::mutex record_mutex;
std::map<std::string, std::string>& records() {
  static std::map<std::string, std::string> kept;
  return kept;
}
}  // namespace

void record_kernel(const char* op, const char* kernel) {
  const std::lock_guard<std::mutex> lock(record_mutex);
  records()[op] = kernel;
}

std::map<std::string, std::string> last_kernels() {
  const std::lock_guard<std::mutex> lock(record_mutex);
  return records();
}

}  // namespace cuda
}  // namespace mxmoe
