// An array on the device: where it is, its shape and dtype, and what keeps it alive.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/dlpack_abi.h"
#include "core/types.h"
#include "cuda/arena.h"
#include "cuda/stream.h"

namespace mxmoe {
namespace cuda {

// Copies share the memory.
struct DeviceArray {
  Tensor tensor;
  int device = 0;
  bool read_only = false;
  std::shared_ptr<Memory> memory;  // our own, or null
  std::shared_ptr<void> owner;     // somebody else's, or null
};

// Uninitialised. Throws ValueError for sizes no memory has, OutOfMemory naming `what`.
DeviceArray allocate(const std::shared_ptr<Stream>& stream, const std::vector<int64_t>& shape, DType dtype,
                     const char* what);
DeviceArray allocate(const std::shared_ptr<Arena>& arena, int device, const std::vector<int64_t>& shape, DType dtype,
                     const char* what);
DeviceArray allocate(Pool& pool, const std::vector<int64_t>& shape, DType dtype, const char* what);
// In host memory that the device reads and writes, zeros at first. Given back when the stream has ended what it was
// given by then.
DeviceArray host_array(const std::shared_ptr<Stream>& stream, const std::vector<int64_t>& shape, DType dtype,
                       const char* what);
// Of the same number of elements; one size may be -1. The array must be contiguous.
DeviceArray reshape(const DeviceArray& array, const std::vector<int64_t>& shape);

// Both wait for the stream. The host side is contiguous; the device side may have strides.
void to_host(Stream& stream, const DeviceArray& array, void* host);
void from_host(Stream& stream, const DeviceArray& array, const void* host);

// From rows at any one distance to a contiguous array of the same shape, in the order of the stream.
void copy_on_device(Stream& stream, const DeviceArray& from, const DeviceArray& to);

// The array as DLPack hands it over; the deleter lets go of it. Who gets it orders its own work (see
// Stream::let_wait).
dlpack::ManagedVersioned* export_versioned(const DeviceArray& array);
dlpack::Managed* export_unversioned(const DeviceArray& array);

}  // namespace cuda
}  // namespace mxmoe
