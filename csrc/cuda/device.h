// Which devices there are, and what is missing when there are none.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace mxmoe {
namespace cuda {

struct Device {
  int index;
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  size_t total_bytes, l2_bytes, shared_bytes_per_block;
};

struct Status {
  int runtime_version;  // as CUDA counts: 13000 is 13.0
  int driver_version;   // 0 without a driver
  std::string problem;  // empty when there is a device that can be used
  std::vector<Device> devices;
};

// Never throws for what the machine lacks.
Status status();
// Asked once a device and kept. Throws CudaError when there is no such device, ValueError for a device too old.
const Device& device(int index);

// Whose kernels run: "sm_90a" takes Hopper's own instructions, "sm_80" runs everywhere. The best that the device and
// this build have, best last.
std::vector<std::string> available_architectures(int index);
// The one in force: set_architecture's, else MXMOE_CUDA_ARCH's, else the best. Throws ValueError for a name that is
// unknown or that the device lacks.
std::string active_architecture(int index);
void set_architecture(const std::string& name);  // empty: no longer forced
bool on_hopper(int index);                       // whether it is sm_90a

}  // namespace cuda
}  // namespace mxmoe
