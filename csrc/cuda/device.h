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

}  // namespace cuda
}  // namespace mxmoe
