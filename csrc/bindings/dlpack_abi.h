// The memory layout of DLPack 1.0 structures and of 1.3's table of functions, as its specification fixes them.
#pragma once

#include <cstdint>

namespace mxmoe {
namespace dlpack {

constexpr int32_t kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13;
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };
constexpr uint64_t kReadOnly = 1, kCopied = 2;

struct Device {
  int32_t type;
  int32_t id;
};
struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct Array {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // elements; null for contiguous
  uint64_t byte_offset;
};
struct Managed {
  Array array;
  void* context;
  void (*deleter)(Managed*);
};
struct Version {
  uint32_t major;
  uint32_t minor;
};
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Array array;
};

// A type's way to export without a Python call, in a capsule that its __dlpack_c_exchange_api__ holds. Functions
// return 0, or set a Python error; null is allowed for `view` alone. The table lives as long as the process.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* unused_allocate;
  int (*managed)(void* object, ManagedVersioned** out);
  void* unused_to_object;
  int (*view)(void* object, Array* out);  // borrowed from the object
  void* unused_stream;
};

}  // namespace dlpack
}  // namespace mxmoe
