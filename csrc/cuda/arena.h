// Device memory: single blocks in stream order, and arenas of many pieces that live and die together.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "cuda/stream.h"

namespace mxmoe {
namespace cuda {

constexpr size_t kDeviceAlign = 256;  // what cudaMalloc gives; more than any access of a kernel wants

// One allocation, from when the stream gets there until the stream gets to its release.
class Memory {
 public:
  Memory(std::shared_ptr<Stream> stream, size_t bytes, const char* what);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }
  // Others may use it on streams of their own: its release then waits for the whole device.
  void share() { shared_ = true; }

 private:
  std::shared_ptr<Stream> stream_;
  void* data_ = nullptr;
  bool shared_ = false;
};

// Pieces taken one after the other from large chunks, such as a model's weights; all given back at once. Chunks that
// are nearly full waste little, and thousands of small tensors do not become thousands of allocations.
class Arena {
 public:
  Arena(std::shared_ptr<Stream> stream, size_t chunk_bytes, std::string name);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  void* allocate(size_t bytes, const char* what);        // aligned to kDeviceAlign; not to be called during a capture
  size_t allocated_bytes() const { return allocated_; }  // from the device
  size_t used_bytes() const { return used_; }            // handed out

 private:
  struct Chunk {
    char* data;
    size_t size, used;
  };
  std::shared_ptr<Stream> stream_;
  size_t chunk_bytes_;
  std::string name_;
  std::vector<Chunk> chunks_;
  size_t allocated_ = 0, used_ = 0;
};

}  // namespace cuda
}  // namespace mxmoe
