#include "cuda/upload.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "cuda/error.h"

namespace mxmoe {
namespace cuda {

Uploader::Uploader(std::shared_ptr<Stream> stream, size_t buffer_bytes)
    : stream_(std::move(stream)), buffer_bytes_(buffer_bytes) {
  check_value(buffer_bytes > 0, "buffer_bytes is 0; wanted 1 or more");
  const DeviceGuard guard(stream_->device());
  for (Buffer& buffer : buffers_) {
    buffer.sent = std::make_unique<Event>();
    const cudaError_t status = cudaMallocHost(&buffer.pinned, buffer_bytes_);
    if (status == cudaSuccess) continue;
    for (Buffer& made : buffers_) {
      if (made.pinned != nullptr) cudaFreeHost(made.pinned);
    }
    check(status, "cudaMallocHost");
  }
}

Uploader::~Uploader() {
  for (Buffer& buffer : buffers_) {
    if (buffer.in_flight) cudaEventSynchronize(buffer.sent->handle());
    cudaFreeHost(buffer.pinned);
  }
}

void Uploader::copy(void* device, const void* host, size_t bytes) {
  check_value(!stream_->capturing(), "an upload cannot be captured in a graph; wanted it before");
  const DeviceGuard guard(stream_->device());
  for (size_t done = 0; done < bytes; done += buffer_bytes_) {
    Buffer& buffer = buffers_[next_++ % buffers_.size()];
    if (buffer.in_flight) buffer.sent->synchronize();
    const size_t n = std::min(buffer_bytes_, bytes - done);
    std::memcpy(buffer.pinned, static_cast<const char*>(host) + done, n);
    MXMOE_CUDA(cudaMemcpyAsync(static_cast<char*>(device) + done, buffer.pinned, n, cudaMemcpyHostToDevice,
                               stream_->handle()));
    buffer.sent->record(stream_->handle());
    buffer.in_flight = true;
  }
}

}  // namespace cuda
}  // namespace mxmoe
