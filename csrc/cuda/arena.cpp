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
  if (chunks_.empty() || chunks_.back().size - chunks_.back().used < wanted) {
    check_value(!stream_->capturing(), what, " cannot be allocated while a graph is captured");
    const DeviceGuard guard(stream_->device());
    Chunk chunk{nullptr, std::max(chunk_bytes_, wanted), 0};
    void* data = nullptr;
    if (cudaMalloc(&data, chunk.size) != cudaSuccess) {
      throw_out_of_memory(chunk.size,
                          concat(what, " (", name_, " has ", bytes_string(allocated_), " already)").c_str());
    }
    chunk.data = static_cast<char*>(data);
    emulation::guard_memory(chunk.data, chunk.size);
    chunks_.push_back(chunk);
    allocated_ += chunk.size;
  }
  Chunk& chunk = chunks_.back();
  char* piece = chunk.data + chunk.used;
  emulation::unguard_memory(piece, bytes);
  chunk.used += wanted;
  used_ += bytes;
  return piece;
}

}  // namespace cuda
}  // namespace mxmoe
