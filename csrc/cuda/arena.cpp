#include "cuda/arena.h"

#include <algorithm>
#include <mutex>

#include "core/check.h"
#include "cuda/error.h"

#if defined(MXMOE_CUDA_EMULATION)
#include "cuda/emulation/guard.h"
#else
namespace mxmoe {
namespace emulation {
constexpr size_t kGuardBytes = 0;  // on a device nobody would see what is written into a gap
inline void guard_memory(void*, size_t) {}
inline void unguard_memory(void*, size_t) {}
}  // namespace emulation
}  // namespace mxmoe
#endif

namespace mxmoe {
namespace cuda {
namespace {

// Memory given back stays with the process: the next op wants it again.
void keep_released_memory(int device) {
  static std::once_flag once[64];
  if (device >= 64) return;
  std::call_once(once[device], [&] {
    cudaMemPool_t pool;
    uint64_t everything = UINT64_MAX;
    MXMOE_CUDA(cudaDeviceGetDefaultMemPool(&pool, device));
    MXMOE_CUDA(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &everything));
  });
}

size_t round_up(size_t bytes, size_t step) { return (bytes + step - 1) / step * step; }

}  // namespace

Memory::Memory(std::shared_ptr<Stream> stream, size_t bytes, const char* what) : stream_(std::move(stream)) {
  if (bytes == 0) return;
  check_value(!stream_->capturing(), what,
              " cannot be allocated while a graph is captured; wanted arrays made before");
  const DeviceGuard guard(stream_->device());
  keep_released_memory(stream_->device());
  if (cudaMallocAsync(&data_, bytes, stream_->handle()) != cudaSuccess) throw_out_of_memory(bytes, what);
}

Memory::~Memory() {
  if (data_ == nullptr) return;
  if (shared_) {
    cudaFree(data_);
  } else {
    cudaFreeAsync(data_, stream_->handle());
  }
}

Arena::Arena(std::shared_ptr<Stream> stream, size_t chunk_bytes, std::string name)
    : stream_(std::move(stream)), chunk_bytes_(round_up(chunk_bytes, kDeviceAlign)), name_(std::move(name)) {
  check_value(chunk_bytes > 0, "chunk_bytes is 0; wanted 1 or more");
}

Arena::~Arena() {
  for (const Chunk& chunk : chunks_) {
    emulation::unguard_memory(chunk.data, chunk.size);
    cudaFree(chunk.data);  // which waits for whatever still uses it
  }
}

void* Arena::allocate(size_t bytes, const char* what) {
  check_value(bytes <= SIZE_MAX - 2 * kDeviceAlign - emulation::kGuardBytes, what, " has ", bytes,
              " bytes; wanted a size that memory can have");
  const size_t wanted = std::max(round_up(bytes, kDeviceAlign), kDeviceAlign) + emulation::kGuardBytes;
  // What is large has memory of its own, so that it leaves no chunk half empty.
  const bool alone = wanted > chunk_bytes_ / 4;
  if (alone || chunks_.empty() || chunks_.back().size - chunks_.back().used < wanted) {
    check_value(!stream_->capturing(), what, " cannot be allocated while a graph is captured");
    const DeviceGuard guard(stream_->device());
    Chunk chunk{nullptr, alone ? wanted : chunk_bytes_, 0};
    void* data = nullptr;
    if (cudaMalloc(&data, chunk.size) != cudaSuccess) {
      throw_out_of_memory(chunk.size,
                          concat(what, " (", name_, " has ", bytes_string(allocated_), " already)").c_str());
    }
    chunk.data = static_cast<char*>(data);
    emulation::guard_memory(chunk.data, chunk.size);
    // The last one is the one that is being filled.
    chunks_.insert(alone && !chunks_.empty() ? chunks_.end() - 1 : chunks_.end(), chunk);
    allocated_ += chunk.size;
  }
  Chunk& chunk = alone && chunks_.size() > 1 ? chunks_[chunks_.size() - 2] : chunks_.back();
  char* piece = chunk.data + chunk.used;
  emulation::unguard_memory(piece, bytes);
  chunk.used += wanted;
  used_ += bytes;
  return piece;
}

Pool::~Pool() {
  for (void* block : all_) cudaFree(block);  // which waits for whatever still uses it
}

void* Pool::find(size_t size, const char* what) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<void*>& fitting = free_[size];
  if (!fitting.empty()) {
    void* block = fitting.back();
    fitting.pop_back();
    return block;
  }
  check_value(!stream_->capturing(), what,
              " cannot be allocated while a graph is captured; wanted the same ops run once before");
  const DeviceGuard guard(stream_->device());
  void* block = nullptr;
  if (cudaMalloc(&block, size) != cudaSuccess) throw_out_of_memory(size, what);
  all_.push_back(block);
  allocated_ += size;
  return block;
}

std::shared_ptr<void> Pool::take(size_t bytes, const char* what) {
  check_value(bytes <= SIZE_MAX - 2 * kDeviceAlign, what, " has ", bytes,
              " bytes; wanted a size that memory can have");
  const size_t size = std::max(round_up(bytes, kDeviceAlign), kDeviceAlign);
  return {find(size, what), [pool = shared_from_this(), size](void* freed) {
            const std::lock_guard<std::mutex> lock(pool->mutex_);
            pool->free_[size].push_back(freed);
          }};
}

}  // namespace cuda
}  // namespace mxmoe
