// The one way a kernel is launched. No <<<>>>, so that the same sources are plain C++ for the emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <utility>

#include "core/check.h"
#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/stream.h"

namespace mxmoe {
namespace cuda {

// What a block gets without asking; more must be allowed for each kernel.
constexpr size_t kPlainSharedBytes = 48 * 1024;

// Dependent: may start before the kernel ahead of it in the stream has ended (sm_90 and later, on a stream that
// overlaps), which a kernel stands that calls ptx::wait_for_previous_kernel() before it touches anything but weights.
// Every such kernel also calls ptx::release_next_kernel(), first of all: the next one's blocks come when the last of
// its own have begun, and wait in turn. Elsewhere the same as Independent. A captured graph keeps it as an edge of
// its own kind (CUDA programming guide, programmatic dependent launch: use in graphs).
enum class Order { Independent, Dependent };

[[noreturn]] void throw_launch_error(cudaError_t status, const void* kernel, dim3 grid, dim3 block,
                                     size_t shared_bytes);
// For tests: which kernel ran last for an op (see record_kernel).
void record_kernel(const char* op, const char* kernel);

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Stream& stream, Order order,
            Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const DeviceGuard guard(stream.device());
  const void* address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kPlainSharedBytes) {
    const cudaError_t allowed =
        cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (allowed != cudaSuccess) throw_launch_error(allowed, address, grid, block, shared_bytes);
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.handle();
  if (order == Order::Dependent && stream.overlaps()) config.attrs = &early, config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (status != cudaSuccess) throw_launch_error(status, address, grid, block, shared_bytes);
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Stream& stream,
            Args&&... args) {
  launch(kernel, grid, block, shared_bytes, stream, Order::Independent, std::forward<Args>(args)...);
}

// A grid's x goes to 2^31 - 1; work that is larger than that is a mistake.
inline unsigned grid_size(int64_t blocks) {
  check_value(blocks >= 0 && blocks <= std::numeric_limits<int32_t>::max(), "an op would take ", blocks,
              " blocks; wanted at most ", std::numeric_limits<int32_t>::max());
  return static_cast<unsigned>(blocks);
}
// Its y and z to 65535.
inline unsigned grid_depth(int64_t blocks) {
  check_value(blocks >= 0 && blocks <= 65535, "an op would take ", blocks,
              " blocks on one axis; wanted at most 65535");
  return static_cast<unsigned>(blocks);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace mxmoe
