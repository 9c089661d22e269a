// Kernels with one deliberate mistake each, and their right versions, to prove that the emulation tells them apart.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "core/check.h"
#include "cuda/arena.h"
#include "cuda/launch.h"
#include "cuda/numeric.cuh"
#include "emulation/bind_emulation.h"

namespace mxmoe {
namespace emulation {
namespace {

using cuda::kAllLanes;

constexpr int kThreads = 64;
constexpr int kValues = 64;

__device__ float* shared_floats() { return reinterpret_cast<float*>(ptx::dynamic_shared()); }

// Reverses 64 values through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  float* shared = shared_floats();
  shared[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// The same with cp.async.
template <bool kWait>
__global__ void reverse_async_kernel(const float* in, float* out) {
  float* shared = shared_floats();
  if (threadIdx.x < kValues / 4) ptx::cp_async_16(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  ptx::cp_async_commit();
  if (kWait) ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

enum RingMistake { kRight, kNoFullWait, kNoEmptyWait, kNoArrival, kNoInit };
// Reverses 32 values, then 32 more: one warp puts them where the other takes them, which two mbarriers tell them.
template <RingMistake kMistake>
__global__ void ring_kernel(const float* in, float* out) {
  float* shared = shared_floats();
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + 32);
  uint64_t* empty = full + 1;
  if (kMistake != kNoInit && threadIdx.x == 0) ptx::phase_init(full, 32), ptx::phase_init(empty, 32);
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  for (unsigned round = 0; round < 2; ++round) {
    if (threadIdx.x < 32) {
      if (kMistake != kNoEmptyWait) ptx::phase_wait(empty, (round + 1) % 2);
      shared[lane] = in[32 * round + lane];
      if (kMistake != kNoArrival || lane != 5) ptx::phase_arrive(full);
    } else {
      if (kMistake != kNoFullWait) ptx::phase_wait(full, round % 2);
      out[32 * round + lane] = shared[31 - lane];
      ptx::phase_arrive(empty);
    }
  }
}

template <int kPast>
__global__ void global_read_kernel(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + kPast];
}
template <int kPast>
__global__ void shared_write_kernel(const float* in, float* out) {
  shared_floats()[threadIdx.x + kPast] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared_floats()[threadIdx.x];
}
__global__ void unwritten_shared_kernel(const float*, float* out) { out[threadIdx.x] = shared_floats()[threadIdx.x]; }
__global__ void divergent_barrier_kernel(const float* in, float* out) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}
__global__ void early_exit_kernel(const float* in, float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}
__global__ void divergent_warp_kernel(const float* in, float* out) {
  float x = in[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    x = __shfl_xor_sync(kAllLanes, x, 1);
  } else {
    x = __shfl_sync(kAllLanes, x, 0);
  }
  out[threadIdx.x] = x;
}
__global__ void missing_lanes_kernel(const float* in, float* out) {
  float x = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) x = cuda::warp_sum(x);
  out[threadIdx.x] = x;
}
__global__ void misaligned_async_kernel(const float* in, float* out) {
  ptx::cp_async_16(shared_floats(), in + 1, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[threadIdx.x] = shared_floats()[0];
}

// c = a b for a (16 x 16) and b (16 x 8), values small integers: exact in bfloat16 and float32.
template <int kWrong>
__global__ void mma_kernel(const float* in, float* out) {
  if (threadIdx.x >= 32) return;
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto a = [&](int row, int column) { return in[(row * 16 + column) % kValues]; };
  const auto b = [&](int row, int column) { return in[(row * 8 + column + 3) % kValues]; };
  const int at = kWrong == 1 ? t : 2 * t;  // mistake 1: lanes hold neighbours, not pairs
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) {
    // mistake 2: the second and third register exchanged
    const int r = kWrong == 2 && (i == 1 || i == 2) ? 3 - i : i;
    const int row = g + r % 2 * 8, column = at + r / 2 * 8;
    fragment[i] = ptx::pack_bf16(a(row, column), a(row, column + 1));
  }
  float c[4] = {};
  ptx::mma_bf16_m16n8k16(c, fragment, ptx::pack_bf16(b(2 * t, g), b(2 * t + 1, g)),
                         ptx::pack_bf16(b(2 * t + 8, g), b(2 * t + 9, g)));
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

// b through shared memory and ldmatrix.trans, a through ldmatrix.
__global__ void ldmatrix_kernel(const float* in, float* out) {
  uint16_t* a = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  uint16_t* b = a + 256;
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += kThreads) a[i] = cuda::narrow<bf16>(in[i % kValues]).bits;
  // Two copies of b side by side: x4 takes 16 columns.
  for (int i = lane; i < 256; i += kThreads) b[i] = cuda::narrow<bf16>(in[(i / 16 * 8 + i % 8 + 3) % kValues]).bits;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  uint32_t left[4], right[4];
  ptx::ldmatrix_x4(left, a + (lane / 8 % 2 * 8 + lane % 8) * 16 + lane / 16 * 8);
  ptx::ldmatrix_x4_trans(right, b + (lane / 8 % 2 * 8 + lane % 8) * 16 + lane / 16 * 8);
  float c[4] = {}, again[4] = {};
  ptx::mma_bf16_m16n8k16(c, left, right[0], right[1]);
  ptx::mma_bf16_m16n8k16(again, left, right[2], right[3]);
  for (int i = 0; i < 4; ++i) {
    out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i] == again[i] ? c[i] : cuda::quiet_nan();
  }
}

using Kernel = void (*)(const float*, float*);
const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> all = {
      {"reverse", reverse_kernel<true>},
      {"reverse without a barrier", reverse_kernel<false>},
      {"async", reverse_async_kernel<true>},
      {"async without a wait", reverse_async_kernel<false>},
      {"ring", ring_kernel<kRight>},
      {"ring without a wait for what is full", ring_kernel<kNoFullWait>},
      {"ring without a wait for what is empty", ring_kernel<kNoEmptyWait>},
      {"ring without an arrival", ring_kernel<kNoArrival>},
      {"ring without a beginning", ring_kernel<kNoInit>},
      {"read", global_read_kernel<0>},
      {"read past the end", global_read_kernel<1>},
      {"read far past the end", global_read_kernel<100>},
      {"shared", shared_write_kernel<0>},
      {"shared past the end", shared_write_kernel<1>},
      {"unwritten shared memory", unwritten_shared_kernel},
      {"divergent barrier", divergent_barrier_kernel},
      {"early exit", early_exit_kernel},
      {"divergent collectives", divergent_warp_kernel},
      {"missing lanes", missing_lanes_kernel},
      {"misaligned async", misaligned_async_kernel},
      {"mma", mma_kernel<0>},
      {"mma with wrong columns", mma_kernel<1>},
      {"mma with wrong registers", mma_kernel<2>},
      {"ldmatrix", ldmatrix_kernel},
  };
  return all;
}

// 64 values in, 128 out. Raises what the stream raises.
std::vector<float> run(const std::string& name, const std::vector<float>& in) {
  check_value(in.size() == kValues, "in has ", in.size(), " values; wanted ", kValues);
  const auto found = kernels().find(name);
  check_value(found != kernels().end(), "there is no kernel '", name, "'");
  const auto stream = std::make_shared<cuda::Stream>(0);
  const cuda::Memory from(stream, kValues * sizeof(float), "in"), to(stream, 128 * sizeof(float), "out");
  std::vector<float> out(128);
  MXMOE_CUDA(
      cudaMemcpyAsync(from.data(), in.data(), kValues * sizeof(float), cudaMemcpyHostToDevice, stream->handle()));
  const size_t shared = name == "ldmatrix" ? 1024 : kThreads * sizeof(float);
  cuda::launch(found->second, 1, kThreads, shared, *stream, static_cast<const float*>(from.data()),
               static_cast<float*>(to.data()));
  MXMOE_CUDA(
      cudaMemcpyAsync(out.data(), to.data(), out.size() * sizeof(float), cudaMemcpyDeviceToHost, stream->handle()));
  stream->synchronize();
  return out;
}

}  // namespace

void bind_emulation(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("set_seed", &set_seed, py::arg("seed"));
  m.def("clear_fault", &clear_fault);
  m.def("set_memory_limit", &set_memory_limit, py::arg("num_bytes"));
  m.def("device_bytes", &device_bytes);
  bind_products(m);
  m.def("run_kernel", &run, py::arg("name"), py::arg("values"));
#if defined(__SANITIZE_ADDRESS__)
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
}

}  // namespace emulation
}  // namespace mxmoe
