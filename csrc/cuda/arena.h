// Device memory: single blocks in stream order, and arenas of many pieces that live and die together.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
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

// Blocks that come back when they are let go of, in the order of one stream: what runs a second time finds all its
// blocks and allocates nothing, so that it can be captured in a graph. The graph must not outlive the pool.
class Pool : public std::enable_shared_from_this<Pool> {
 public:
  explicit Pool(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {}
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  std::shared_ptr<void> take(size_t bytes, const char* what);
  int device() const { return stream_->device(); }
  size_t allocated_bytes() const { return allocated_; }

 private:
  void* find(size_t size, const char* what);

  std::shared_ptr<Stream> stream_;
  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> free_;  // by size
  std::vector<void*> all_;
  size_t allocated_ = 0;
};

}  // namespace cuda
}  // namespace mxmoe
