// Matrix products of a warpgroup, right and with one deliberate mistake each.
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

constexpr int kThreads = 128, kM = 64, kN = 16, kK = 128, kSteps = kK / 16;
constexpr int kRowBytes = 128, kPattern = 8 * kRowBytes;

enum Mistake {
  kNone,
  kNoProxyFence,   // shared memory is read as it was before
  kOneProxyFence,  // one thread fences for what all have copied
  kNoFence,        // registers are not fenced
  kNoWait,         // sums are read while products run
  kNoEnd,          // and nobody ever waits
  kTileOverwritten,
  kRegistersOverwritten,
  kNoSwizzle,
  kWrongRegisters,  // the second and third exchanged
  kOtherStride,
  kMisplaced,  // a tile that does not begin with a pattern
  kPastTheEnd,
  kNotAccumulated,
  kMissingWarp,
  kDifferentTiles,
};

// Where a value stands in a tile of rows of 64: K-major for rows of a matrix, transposed for values of K.
__device__ int place(int row, int value, bool swizzled) {
  const int piece = swizzled ? value / 8 ^ row % 8 : value / 8;
  return row * kRowBytes + piece * 16 + value % 8 * 2;
}

__device__ void put(unsigned char* tile, int at, float x) {
  *reinterpret_cast<uint16_t*>(tile + at) = cuda::narrow<bf16>(x).bits;
}

__device__ float a_value(const float* in, int row, int k) { return in[(5 * row + k) % 64]; }
__device__ float b_value(const float* in, int k, int n) { return in[(3 * k + 7 * n + 1) % 64]; }

// out (64, 16) = a (64, 128) b (128, 16), a from registers, b in two tiles of 64 values of K.
template <Mistake kMistake>
__global__ void product_kernel(const float* in, float* out) {
  unsigned char* b = ptx::dynamic_shared();
  constexpr int kTile = kN * kRowBytes;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  if (kMistake == kMisplaced) b += kRowBytes;
  for (int i = thread; i < kN * kK; i += kThreads) {
    put(b + i / (kN * 64) * kTile, place(i / 64 % kN, i % 64, kMistake != kNoSwizzle),
        b_value(in, i / (kN * 64) * 64 + i % 64, i / 64 % kN));
  }
  if (kMistake != kNoProxyFence) ptx::fence_proxy_async();
  __syncthreads();
  if (kMistake == kMissingWarp && warp == 3) return;
  if (kMistake == kDifferentTiles && warp == 3) b += kTile;
  uint32_t a[kSteps][4];
  for (int s = 0; s < kSteps; ++s) {
    for (int i = 0; i < 4; ++i) {
      const int r = kMistake == kWrongRegisters && (i == 1 || i == 2) ? 3 - i : i;
      const int row = 16 * warp + g + r % 2 * 8, k = 16 * s + 2 * t + r / 2 * 8;
      a[s][i] = ptx::pack_bf16(a_value(in, row, k), a_value(in, row, k + 1));
    }
  }
  float d[kN / 2] = {};
  if (kMistake != kNoFence) ptx::wgmma_fence();
  for (int s = 0; s < kSteps; ++s) {
    const unsigned char* tile = b + s / 4 * kTile + s % 4 * 32 + (kMistake == kPastTheEnd && s == 7 ? kTile : 0);
    ptx::wgmma_bf16<kN>(d, a[s], ptx::matrix_descriptor(tile, kMistake == kOtherStride ? 2 * kPattern : kPattern),
                        s > 0 && kMistake != kNotAccumulated);
  }
  ptx::wgmma_commit();
  if (kMistake == kTileOverwritten || kMistake == kRegistersOverwritten) __syncthreads();  // all have issued theirs
  if (kMistake == kTileOverwritten) put(b, 0, 100.0f);
  if (kMistake == kRegistersOverwritten) a[0][0] = ptx::pack_bf16(100.0f, 100.0f);
  if (kMistake == kNoWait || kMistake == kNoEnd) {
    ptx::wgmma_wait<1>();
  } else {
    ptx::wgmma_wait<0>();
  }
  for (int i = 0; i < kN / 2; ++i) {
    out[(16 * warp + g + i % 4 / 2 * 8) * kN + i / 4 * 8 + 2 * t + i % 2] = d[i];
  }
  if (kMistake == kNoWait) ptx::wgmma_wait<0>();
}

// The same from shared memory alone, b transposed and of 64 columns, in groups that overlap; a as well where `kBoth`.
template <bool kBoth>
__global__ void shared_product_kernel(const float* in, float* out) {
  constexpr int kColumns = 64;
  unsigned char *a = ptx::dynamic_shared(), *b = a + kM * kK * 2;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  for (int i = thread; i < kM * kK; i += kThreads) {
    const int row = i / kK, k = i % kK;
    if (kBoth) {
      put(a, place(k, row, true), a_value(in, row, k));
    } else {
      put(a + k / 64 * kM * kRowBytes, place(row, k % 64, true), a_value(in, row, k));
    }
  }
  for (int i = thread; i < kK * kColumns; i += kThreads) {
    const int k = i / kColumns, n = i % kColumns;
    put(b, place(k, n, true), b_value(in, k, n % kN));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kColumns / 2] = {};
  for (int s = 0; s < kSteps; ++s) {
    ptx::wgmma_fence();
    const uint64_t b_tile = ptx::matrix_descriptor(b + s * 2 * kPattern, kPattern);
    const unsigned char* from = kBoth ? a + s * 2 * kPattern : a + s / 4 * kM * kRowBytes + s % 4 * 32;
    ptx::wgmma_bf16<kColumns, kBoth, true>(d, ptx::matrix_descriptor(from, kPattern), b_tile, s > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
  }
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kColumns / 2; ++i) {
    const int column = i / 4 * 8 + 2 * t + i % 2;
    if (column < kN) out[(16 * warp + g + i % 4 / 2 * 8) * kN + column] = d[i];
  }
}

// out[row] = the sum of 64 values that cp.async brings, in every row and column.
template <Mistake kMistake>
__global__ void copied_product_kernel(const float* in, float* out) {
  unsigned char* b = ptx::dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  // Through global memory: out serves as scratch first.
  if (thread < 64) reinterpret_cast<uint16_t*>(out)[thread] = cuda::narrow<bf16>(in[thread]).bits;
  __syncthreads();
  const int row = thread / 8, piece = thread % 8;
  if (row < 8)
    ptx::cp_async_16(b + row * kRowBytes + (piece ^ row) * 16, reinterpret_cast<uint16_t*>(out) + 8 * piece, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (kMistake != kOneProxyFence || thread == 0) ptx::fence_proxy_async();
  __syncthreads();
  uint32_t ones[4];
  for (uint32_t& one : ones) one = ptx::pack_bf16(1.0f, 1.0f);
  float d[4] = {};
  ptx::wgmma_fence();
  for (int s = 0; s < 4; ++s) ptx::wgmma_bf16<8>(d, ones, ptx::matrix_descriptor(b + 32 * s, kPattern), s > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < 4; ++i) {
    const int at = (16 * warp + g + i / 2 * 8) * kN + 2 * t + i % 2;
    out[at] = out[at + 8] = d[i];
  }
}

struct Case {
  void (*kernel)(const float*, float*);
  size_t shared_bytes;
};
const std::map<std::string, Case>& cases() {
  constexpr size_t kTiles = kN * kK * 2, kBoth = (kM + 64) * kK * 2, kOne = 8 * kRowBytes;
  static const std::map<std::string, Case> all = {
      {"right", {product_kernel<kNone>, kTiles}},
      {"from shared memory", {shared_product_kernel<false>, kBoth}},
      {"both transposed", {shared_product_kernel<true>, kBoth}},
      {"copied", {copied_product_kernel<kNone>, kOne}},
      {"no proxy fence", {product_kernel<kNoProxyFence>, kTiles}},
      {"one proxy fence", {copied_product_kernel<kOneProxyFence>, kOne}},
      {"no fence", {product_kernel<kNoFence>, kTiles}},
      {"no wait", {product_kernel<kNoWait>, kTiles}},
      {"no end", {product_kernel<kNoEnd>, kTiles}},
      {"tile overwritten", {product_kernel<kTileOverwritten>, kTiles}},
      {"registers overwritten", {product_kernel<kRegistersOverwritten>, kTiles}},
      {"no swizzle", {product_kernel<kNoSwizzle>, kTiles}},
      {"wrong registers", {product_kernel<kWrongRegisters>, kTiles}},
      {"other stride", {product_kernel<kOtherStride>, kTiles + kPattern}},
      {"misplaced", {product_kernel<kMisplaced>, kTiles + kRowBytes}},
      {"past the end", {product_kernel<kPastTheEnd>, kTiles}},
      {"not accumulated", {product_kernel<kNotAccumulated>, kTiles}},
      {"missing warp", {product_kernel<kMissingWarp>, kTiles}},
      {"different tiles", {product_kernel<kDifferentTiles>, kTiles}},
  };
  return all;
}

// 64 values in, (64, 16) out. Raises what the stream raises.
std::vector<float> run(const std::string& name, const std::vector<float>& in) {
  check_value(in.size() == 64, "in has ", in.size(), " values; wanted 64");
  const auto found = cases().find(name);
  check_value(found != cases().end(), "there is no product '", name, "'");
  const auto stream = std::make_shared<cuda::Stream>(0);
  std::vector<float> out(kM * kN);
  const size_t in_bytes = in.size() * sizeof(float), out_bytes = out.size() * sizeof(float);
  const cuda::Memory from(stream, in_bytes, "in"), to(stream, out_bytes, "out");
  MXMOE_CUDA(cudaMemcpyAsync(from.data(), in.data(), in_bytes, cudaMemcpyHostToDevice, stream->handle()));
  cuda::launch(found->second.kernel, 1, kThreads, found->second.shared_bytes, *stream,
               static_cast<const float*>(from.data()), static_cast<float*>(to.data()));
  MXMOE_CUDA(cudaMemcpyAsync(out.data(), to.data(), out_bytes, cudaMemcpyDeviceToHost, stream->handle()));
  stream->synchronize();
  return out;
}

}  // namespace

void bind_products(pybind11::module_& m) {
  m.def("run_product", &run, pybind11::arg("name"), pybind11::arg("values"));
}

}  // namespace emulation
}  // namespace mxmoe
