// From host memory to the device at the bus's speed without a second copy of the model on the host: two pinned
// buffers take turns, one filled from the (mapped) source while the other is on its way.
#pragma once

#include <array>
#include <cstddef>
#include <memory>

#include "cuda/stream.h"

namespace mxmoe {
namespace cuda {

class Uploader {
 public:
  // 16 MiB keep a PCIe 5 link busy for 0.3 ms, long against the 10 us that a copy's start takes.
  static constexpr size_t kDefaultBytes = size_t{16} << 20;

  explicit Uploader(std::shared_ptr<Stream> stream, size_t buffer_bytes = kDefaultBytes);
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
  // The source may change or vanish once this returns; the destination is written when the stream gets there.
  void copy(void* device, const void* host, size_t bytes);

 private:
  struct Buffer {
    void* pinned = nullptr;
    std::unique_ptr<Event> sent;
    bool in_flight = false;
  };
  std::shared_ptr<Stream> stream_;
  size_t buffer_bytes_;
  std::array<Buffer, 2> buffers_;
  size_t next_ = 0;
};

}  // namespace cuda
}  // namespace mxmoe
