#include "cuda/stream.h"

#include <algorithm>

#include "core/check.h"
#include "cuda/device.h"
#include "cuda/error.h"

namespace mxmoe {
namespace cuda {

DeviceGuard::DeviceGuard(int device) {
  MXMOE_CUDA(cudaGetDevice(&before_));
  MXMOE_CUDA(cudaSetDevice(device));
}
DeviceGuard::~DeviceGuard() { cudaSetDevice(before_); }

Event::Event(bool timing) {
  MXMOE_CUDA(cudaEventCreateWithFlags(&event_, timing ? cudaEventDefault : cudaEventDisableTiming));
}
Event::~Event() { cudaEventDestroy(event_); }
void Event::record(cudaStream_t stream) { MXMOE_CUDA(cudaEventRecord(event_, stream)); }
void Event::synchronize() const { MXMOE_CUDA(cudaEventSynchronize(event_)); }
float Event::milliseconds_since(const Event& earlier) const {
  float milliseconds = 0.0f;
  MXMOE_CUDA(cudaEventElapsedTime(&milliseconds, earlier.event_, event_));
  return milliseconds;
}

Stream::Stream(int index) : device_(cuda::device(index).index) {
  const DeviceGuard guard(device_);
  // Not the legacy stream's friend: that one would make every stream of the process wait.
  MXMOE_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
}

Stream::~Stream() {
  for (void* block : retired_) cudaFree(block);
  if (workspace_ != nullptr) cudaFree(workspace_);
  if (counters_ != nullptr) cudaFree(counters_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

void Stream::synchronize() const { MXMOE_CUDA(cudaStreamSynchronize(stream_)); }

bool Stream::capturing() const {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  MXMOE_CUDA(cudaStreamIsCapturing(stream_, &capture));
  return capture != cudaStreamCaptureStatusNone;
}

void Stream::wait_for(cudaStream_t other) {
  if (other == stream_) return;
  const DeviceGuard guard(device_);
  Event done;
  done.record(other);
  MXMOE_CUDA(cudaStreamWaitEvent(stream_, done.handle(), 0));
}

void Stream::let_wait(cudaStream_t other) {
  if (other == stream_) return;
  const DeviceGuard guard(device_);
  Event done;
  done.record(stream_);
  MXMOE_CUDA(cudaStreamWaitEvent(other, done.handle(), 0));
}

void Stream::grow(void** block, size_t* held, size_t wanted, const char* what) {
  check_value(!capturing(), what, " want ", bytes_string(wanted), " of which ", bytes_string(*held),
              " are there, and nothing can be allocated while a graph is captured; run the same once before");
  const DeviceGuard guard(device_);
  constexpr size_t kStep = size_t{1} << 20;
  const size_t bytes = (std::max(wanted, 2 * *held) + kStep - 1) / kStep * kStep;
  void* grown = nullptr;
  if (cudaMalloc(&grown, bytes) != cudaSuccess) throw_out_of_memory(bytes, what);
  if (*block != nullptr) retired_.push_back(*block);  // a graph may have its address
  *block = grown, *held = bytes;
}

void* Stream::workspace(size_t bytes, const char* what) {
  if (bytes > workspace_bytes_) grow(&workspace_, &workspace_bytes_, bytes, what);
  return workspace_;
}

unsigned* Stream::counters(size_t count) {
  const size_t bytes = count * sizeof(unsigned);
  if (bytes > counter_bytes_) {
    grow(&counters_, &counter_bytes_, bytes, "counters");
    MXMOE_CUDA(cudaMemsetAsync(counters_, 0, counter_bytes_, stream_));
  }
  return static_cast<unsigned*>(counters_);
}

namespace {
thread_local std::shared_ptr<Stream> current_stream;
}

std::shared_ptr<Stream> Stream::current() {
  if (current_stream) return current_stream;
  // One for all threads that choose none. Kept to the end of the process, when the driver may be gone already.
  static auto* const first = new std::shared_ptr<Stream>(std::make_shared<Stream>(0));
  return *first;
}

void Stream::set_current(std::shared_ptr<Stream> stream) { current_stream = std::move(stream); }

}  // namespace cuda
}  // namespace mxmoe
