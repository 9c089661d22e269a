// Streams and events: in what order the GPU does what it is given.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace mxmoe {
namespace cuda {

// Makes a device the calling thread's current one, and the one before it again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

class Event {
 public:
  explicit Event(bool timing = false);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t handle() const { return event_; }
  void record(cudaStream_t stream);
  void synchronize() const;
  float milliseconds_since(const Event& earlier) const;

 private:
  cudaEvent_t event_ = nullptr;
};

// Shared by everything that allocates or launches on it.
class Stream {
 public:
  explicit Stream(int device);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int device() const { return device_; }
  cudaStream_t handle() const { return stream_; }
  // Held by an op from its first launch to its last: its launches share the workspace.
  std::mutex& mutex() { return mutex_; }
  void synchronize() const;
  bool capturing() const;
  // Whether a launch of Order::Dependent may begin before the kernel ahead of it has ended. Only for work whose
  // weights were there before: kernels ask for those without waiting.
  bool overlaps() const { return overlaps_; }
  void set_overlaps(bool overlaps) { overlaps_ = overlaps; }
  // Work given to this stream from now on waits for what `other` has been given so far; and the reverse.
  void wait_for(cudaStream_t other);
  void let_wait(cudaStream_t other);

  // Memory for one op's intermediate results: valid until the next call, contents lost. It grows outside graph
  // captures only, and what a captured graph may hold on to stays.
  void* workspace(size_t bytes, const char* what);
  // Counters that start at zero and that whoever uses them leaves at zero.
  unsigned* counters(size_t count);

  // The stream that a thread's ops go to; made when first asked for.
  static std::shared_ptr<Stream> current();
  static void set_current(std::shared_ptr<Stream> stream);  // null: the default again

 private:
  void grow(void** block, size_t* held, size_t wanted, const char* what);

  int device_;
  std::mutex mutex_;
  cudaStream_t stream_ = nullptr;
  bool overlaps_ = false;
  void* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  void* counters_ = nullptr;
  size_t counter_bytes_ = 0;
  std::vector<void*> retired_;
};

}  // namespace cuda
}  // namespace mxmoe
