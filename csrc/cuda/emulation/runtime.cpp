#include "cuda/emulation/runtime.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "cuda/emulation/guard.h"

namespace {

using Work = std::function<void()>;
constexpr size_t kDefaultBytes = size_t{1} << 30;
constexpr unsigned char kPoison = 0xFF;

}  // namespace

struct EmulatedRecord {
  EmulatedStream* stream;
  bool done;
  std::chrono::steady_clock::time_point when;
};
// The latest record counts. What is queued holds the record, not the event, which may be gone by then.
struct EmulatedEvent {
  std::shared_ptr<EmulatedRecord> record;
};
struct EmulatedStream {
  std::deque<Work> queue;
  EmulatedGraph* capture = nullptr;
  bool capture_broken = false;
};
struct EmulatedGraph {
  std::vector<Work> nodes;
  std::vector<bool> overlaps;  // with the node before, by what its launch allowed
};

namespace {

struct Machine {
  std::recursive_mutex mutex;
  std::map<char*, size_t> device, pinned;
  std::set<EmulatedStream*> streams;
  EmulatedStream legacy, per_thread;
  size_t limit = kDefaultBytes, used = 0;
  cudaError_t sticky = cudaSuccess, last = cudaSuccess;
  std::string fault;
};

// Compute capability 9.0, or what MXMOE_EMULATED_CAPABILITY says ("8.0").
std::pair<int, int> capability() {
  static const char* const text = std::getenv("MXMOE_EMULATED_CAPABILITY");
  if (text == nullptr) return {9, 0};
  return {std::atoi(text), std::strchr(text, '.') != nullptr ? std::atoi(std::strchr(text, '.') + 1) : 0};
}
size_t most_shared() { return (capability().first >= 9 ? 227 : 163) * size_t{1024}; }

// Never destroyed: streams outlive the module.
Machine& machine() {
  static auto* const one = new Machine;
  return *one;
}
#define LOCKED const std::lock_guard<std::recursive_mutex> lock(machine().mutex)

cudaError_t failed(cudaError_t error) { return machine().last = error; }
cudaError_t result() { return machine().sticky == cudaSuccess ? cudaSuccess : failed(machine().sticky); }

void break_device(cudaError_t error, const std::string& why) {
  if (machine().sticky != cudaSuccess) return;
  machine().sticky = error, machine().fault = why;
}

EmulatedStream* stream_of(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy) return &machine().legacy;
  if (stream == cudaStreamPerThread) return &machine().per_thread;
  return machine().streams.count(stream) != 0 ? stream : nullptr;
}

void drain(EmulatedStream& stream) {
  while (!stream.queue.empty()) {
    const Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    work();
  }
}

void drain_until(const EmulatedRecord& record) {
  while (!record.done && !record.stream->queue.empty()) {
    const Work work = std::move(record.stream->queue.front());
    record.stream->queue.pop_front();
    work();
  }
}

void drain_everything() {
  drain(machine().legacy);
  drain(machine().per_thread);
  for (EmulatedStream* stream : machine().streams) drain(*stream);
}

cudaError_t submit(cudaStream_t handle, Work work, bool overlaps = false) {
  EmulatedStream* stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  if (machine().sticky != cudaSuccess) return failed(machine().sticky);
  if (stream->capture != nullptr) {
    stream->capture->nodes.push_back(std::move(work));
    stream->capture->overlaps.push_back(overlaps);
  } else {
    stream->queue.push_back(std::move(work));
  }
  return cudaSuccess;
}

// Whether [p, p + bytes) lies within one block.
bool within(const std::map<char*, size_t>& blocks, const void* p, size_t bytes) {
  auto* const at = static_cast<char*>(const_cast<void*>(p));
  auto block = blocks.upper_bound(at);
  if (block == blocks.begin()) return false;
  --block;
  return at + bytes <= block->first + block->second;
}

void release_device(void* p) {
  auto& blocks = machine().device;
  const auto block = blocks.find(static_cast<char*>(p));
  if (block == blocks.end()) return break_device(cudaErrorInvalidValue, "memory is freed that is not allocated");
  machine().used -= block->second;
  mxmoe::emulation::unguard_memory(block->first, block->second);
  std::free(block->first);
  blocks.erase(block);
}

void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const auto& device = machine().device;
  const bool to_device = kind != cudaMemcpyDeviceToHost, from_device = kind != cudaMemcpyHostToDevice;
  if ((to_device && !within(device, to, bytes)) || (from_device && !within(device, from, bytes))) {
    return break_device(cudaErrorInvalidValue, "a copy passes the end of device memory or is of host memory");
  }
  std::memmove(to, from, bytes);
}

}  // namespace

namespace mxmoe {
namespace emulation {

cudaError_t submit_kernel(const cudaLaunchConfig_t& config, const void*, std::function<void()> body) {
  LOCKED;
  const uint64_t threads = uint64_t{config.blockDim.x} * config.blockDim.y * config.blockDim.z;
  if (threads == 0 || threads > 1024 || config.dynamicSmemBytes > most_shared() || config.gridDim.x == 0 ||
      config.gridDim.y == 0 || config.gridDim.z == 0 || config.gridDim.y > 65535 || config.gridDim.z > 65535) {
    return failed(cudaErrorInvalidConfiguration);
  }
  bool overlaps = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    overlaps = overlaps || (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                            config.attrs[i].val.programmaticStreamSerializationAllowed != 0);
  }
  const auto run = [config, body = std::move(body)] {
    if (machine().sticky != cudaSuccess) return;
    const std::string wrong = run_grid(config.gridDim, config.blockDim, config.dynamicSmemBytes, body);
    if (!wrong.empty()) break_device(cudaErrorLaunchFailure, wrong);
  };
  return submit(config.stream, run, overlaps);
}

std::string fault() {
  LOCKED;
  return machine().fault;
}
void clear_fault() {
  LOCKED;
  machine().fault.clear();
  machine().sticky = machine().last = cudaSuccess;
}
void set_memory_limit(size_t bytes) {
  LOCKED;
  machine().limit = bytes != 0 ? bytes : kDefaultBytes;
}
size_t device_bytes() {
  LOCKED;
  return machine().used;
}

}  // namespace emulation
}  // namespace mxmoe

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    default:
      return "an emulated error";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  LOCKED;
  return error == machine().sticky && error != cudaSuccess ? machine().fault.c_str() : "refused by the emulation";
}
cudaError_t cudaGetLastError() {
  LOCKED;
  const cudaError_t last = machine().last;
  machine().last = machine().sticky;
  return last;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  LOCKED;
  return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  LOCKED;
  if (device != 0) return failed(cudaErrorInvalidDevice);
  *p = {"emulation on the CPU", capability().first, capability().second, 4, 1 << 20, machine().limit, most_shared()};
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  LOCKED;
  *total_bytes = machine().limit;
  *free_bytes = machine().limit > machine().used ? machine().limit - machine().used : 0;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  LOCKED;
  if (bytes > machine().limit || machine().used > machine().limit - bytes) return failed(cudaErrorMemoryAllocation);
  constexpr size_t kAlign = 256;
  // Of exactly the size asked for, so that the first byte past it is caught.
  if (posix_memalign(p, kAlign, bytes) != 0) return failed(cudaErrorMemoryAllocation);
  std::memset(*p, kPoison, bytes);
  machine().device[static_cast<char*>(*p)] = bytes;
  machine().used += bytes;
  return result();
}
cudaError_t cudaFree(void* p) {
  LOCKED;
  drain_everything();
  if (p != nullptr) release_device(p);
  return result();
}
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t stream) {
  LOCKED;
  if (stream_of(stream) == nullptr) return failed(cudaErrorInvalidResourceHandle);
  return cudaMalloc(p, bytes);
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  LOCKED;
  return submit(stream, [p] { release_device(p); });
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  LOCKED;
  *p = std::malloc(bytes);
  if (*p == nullptr) return failed(cudaErrorMemoryAllocation);
  machine().pinned[static_cast<char*>(*p)] = bytes;
  return result();
}
cudaError_t cudaFreeHost(void* p) {
  LOCKED;
  drain_everything();
  machine().pinned.erase(static_cast<char*>(p));
  std::free(p);
  return result();
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return *pool = nullptr, cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  LOCKED;
  if (kind == cudaMemcpyHostToDevice && !within(machine().pinned, from, bytes)) {
    // Pageable memory has been read when the call returns, as on a device.
    auto held =
        std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    return submit(stream, [=] { copy(to, held->data(), bytes, kind); });
  }
  return submit(stream, [=] { copy(to, from, bytes, kind); });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  LOCKED;
  if (width > to_pitch || width > from_pitch) return failed(cudaErrorInvalidValue);
  if (kind == cudaMemcpyHostToDevice) {  // for pageable memory alone: see above
    auto held = std::make_shared<std::vector<char>>(height * width);
    for (size_t i = 0; i < height; ++i) {
      std::memcpy(held->data() + i * width, static_cast<const char*>(from) + i * from_pitch, width);
    }
    return submit(stream, [=] {
      for (size_t i = 0; i < height; ++i)
        copy(static_cast<char*>(to) + i * to_pitch, held->data() + i * width, width, kind);
    });
  }
  return submit(stream, [=] {
    for (size_t i = 0; i < height; ++i) {
      copy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width, kind);
    }
  });
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  LOCKED;
  return submit(stream, [=] {
    if (!within(machine().device, p, bytes)) {
      return break_device(cudaErrorInvalidValue, "memory is set past the end of a block");
    }
    std::memset(p, value, bytes);
  });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  LOCKED;
  *stream = new EmulatedStream;
  machine().streams.insert(*stream);
  return result();
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  LOCKED;
  if (machine().streams.count(stream) == 0) return failed(cudaErrorInvalidResourceHandle);
  drain(*stream);
  machine().streams.erase(stream);
  delete stream;
  return result();
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  LOCKED;
  EmulatedStream* stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) {
    stream->capture_broken = true;
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  drain(*stream);
  return result();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  LOCKED;
  if (!event->record) return result();
  return submit(stream, [record = event->record] { drain_until(*record); });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  LOCKED;
  EmulatedStream* stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  *status = stream->capture != nullptr ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return result();
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  LOCKED;
  EmulatedStream* stream = stream_of(handle);
  if (stream == nullptr || stream->capture != nullptr) return failed(cudaErrorInvalidValue);
  stream->capture = new EmulatedGraph, stream->capture_broken = false;
  return result();
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  LOCKED;
  EmulatedStream* stream = stream_of(handle);
  if (stream == nullptr || stream->capture == nullptr) return failed(cudaErrorInvalidValue);
  *graph = stream->capture;
  stream->capture = nullptr;
  if (stream->capture_broken) {
    delete *graph;
    *graph = nullptr;
    return failed(cudaErrorStreamCaptureInvalidated);
  }
  return result();
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new EmulatedEvent;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  LOCKED;
  EmulatedStream* stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  event->record = std::make_shared<EmulatedRecord>(EmulatedRecord{stream, false, {}});
  return submit(handle,
                [record = event->record] { record->done = true, record->when = std::chrono::steady_clock::now(); });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  LOCKED;
  if (event->record) drain_until(*event->record);
  return result();
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  LOCKED;
  if (!from->record || !to->record || !from->record->done || !to->record->done) return failed(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(to->record->when - from->record->when).count();
  return result();
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = graph->nodes.size(), cudaSuccess;
}
cudaError_t cudaGraphGetEdges(cudaGraph_t graph, cudaGraphNode_t*, cudaGraphNode_t*, cudaGraphEdgeData* data,
                              size_t* count) {
  if (data == nullptr) return *count = graph->nodes.empty() ? 0 : graph->nodes.size() - 1, cudaSuccess;
  for (size_t i = 0; i < *count; ++i) data[i] = {0, 0, static_cast<unsigned char>(graph->overlaps[i + 1])};
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new EmulatedGraph(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  LOCKED;
  auto nodes = std::make_shared<std::vector<Work>>(executable->nodes);
  return submit(stream, [nodes] {
    for (const Work& work : *nodes) work();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete executable, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetName(const char** name, const void*) { return *name = "a kernel", cudaSuccess; }
