#include "cuda/device.h"

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>

#include "core/check.h"
#include "cuda/error.h"

namespace mxmoe {
namespace cuda {
namespace {

constexpr int kOldestMajor = 8;  // the kernels are built for sm_80 and later

Device query(int index) {
  cudaDeviceProp properties;
  MXMOE_CUDA(cudaGetDeviceProperties(&properties, index));
  return {index,
          properties.name,
          properties.major,
          properties.minor,
          properties.multiProcessorCount,
          properties.totalGlobalMem,
          static_cast<size_t>(properties.l2CacheSize),
          properties.sharedMemPerBlockOptin};
}

std::string version(int number) { return concat(number / 1000, ".", number % 1000 / 10); }

std::string explain(cudaError_t error, const Status& s) {
  if (error == cudaErrorInsufficientDriver && s.driver_version == 0) return "no NVIDIA driver is installed";
  if (error == cudaErrorInsufficientDriver) {
    return concat("the NVIDIA driver knows CUDA ", version(s.driver_version), "; wanted ", version(s.runtime_version),
                  " or later");
  }
  if (error == cudaErrorNoDevice) return "the NVIDIA driver sees no GPU";
  return concat(cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// In order: best last.
constexpr const char* kArchitectures[] = {"sm_80", "sm_90a"};
constexpr int kNotForced = -1, kNotAsked = -2;
std::atomic<int> forced_architecture{kNotAsked};

int architecture_by_name(const std::string& name, const char* what) {
  for (int i = 0; i < 2; ++i) {
    if (name == kArchitectures[i]) return i;
  }
  throw ValueError(concat(what, " is '", name, "'; wanted sm_80 or sm_90a"));
}

// sm_90a's instructions are those of compute capability 9.0 alone.
bool has_hopper_kernels(const Device& d) {
  const std::string built = MXMOE_CUDA_ARCHITECTURES;
  const bool compiled = built.find("90a") != std::string::npos || built == "emulation";
  return compiled && d.major == 9 && d.minor == 0;
}

int architecture(int index) {
  int forced = forced_architecture.load(std::memory_order_acquire);
  if (forced == kNotAsked) {
    const char* name = std::getenv("MXMOE_CUDA_ARCH");
    forced = name != nullptr && *name != '\0' ? architecture_by_name(name, "MXMOE_CUDA_ARCH") : kNotForced;
    forced_architecture.store(forced, std::memory_order_release);
  }
  const bool hopper = has_hopper_kernels(device(index));
  check_value(forced != 1 || hopper, "the architecture is forced to be sm_90a, but device ", index,
              " or this build (", MXMOE_CUDA_ARCHITECTURES, ") lacks it; wanted sm_80");
  return forced != kNotForced ? forced : hopper ? 1 : 0;
}

}  // namespace

std::vector<std::string> available_architectures(int index) {
  std::vector<std::string> names = {kArchitectures[0]};
  if (has_hopper_kernels(device(index))) names.push_back(kArchitectures[1]);
  return names;
}

std::string active_architecture(int index) { return kArchitectures[architecture(index)]; }

void set_architecture(const std::string& name) {
  forced_architecture.store(name.empty() ? kNotAsked : architecture_by_name(name, "architecture"),
                            std::memory_order_release);
}

bool on_hopper(int index) { return architecture(index) == 1; }

Status status() {
  Status s{};
  if (cudaRuntimeGetVersion(&s.runtime_version) != cudaSuccess) s.runtime_version = 0;
  if (cudaDriverGetVersion(&s.driver_version) != cudaSuccess) s.driver_version = 0;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (error != cudaSuccess) {
    s.problem = explain(error, s);
    return s;
  }
  bool usable = false;
  for (int i = 0; i < count; ++i) {
    s.devices.push_back(query(i));
    usable = usable || s.devices.back().major >= kOldestMajor;
  }
  if (!usable) s.problem = count == 0 ? "there is no GPU" : "no GPU has compute capability 8.0 or later";
  return s;
}

const Device& device(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) throw CudaError("there is no GPU to use: " + status().problem);
  check_value(index >= 0 && index < count, "device is ", index, "; wanted 0 to ", count - 1);
  const Device queried = query(index);
  check_value(queried.major >= kOldestMajor, "device ", index, " (", queried.name, ") has compute capability ",
              queried.major, ".", queried.minor, "; wanted 8.0 or later");
  return known.emplace(index, queried).first->second;
}

}  // namespace cuda
}  // namespace mxmoe
