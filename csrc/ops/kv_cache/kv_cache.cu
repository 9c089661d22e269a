#include "ops/kv_cache/kv_cache.h"

#include "core/check.h"
#include "cuda/launch.h"
#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// A block a token and side (keys, values).
template <typename X, typename KV>
__global__ void __launch_bounds__(kThreads)
    kv_cache_write_sm80_kernel(const X* k, int64_t k_stride, const X* v, int64_t v_stride, KV* k_cache, KV* v_cache,
                               const int64_t* slots, int64_t num_slots, int num_heads, int block_size, int head_dim) {
  ptx::wait_for_previous_kernel();
  const int64_t slot = slots[blockIdx.x];
  if (slot < 0 || slot >= num_slots) return;
  const X* from = blockIdx.y == 0 ? k + blockIdx.x * k_stride : v + blockIdx.x * v_stride;
  KV* to = blockIdx.y == 0 ? k_cache : v_cache;
  for (int i = static_cast<int>(threadIdx.x); i < num_heads * head_dim; i += kThreads) {
    const int head = i / head_dim, d = i % head_dim;
    const int64_t row = (slot / block_size * num_heads + head) * block_size + slot % block_size;
    to[row * head_dim + d] = narrow<KV>(widen(from[i]));
  }
}

template <typename X, typename KV>
void launch_write(Stream& stream, const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache) {
  launch(kv_cache_write_sm80_kernel<X, KV>, dim3(grid_size(k.shape[0]), 2), kThreads, 0, stream, k.as<X>(),
         k.stride[0], v.as<X>(), v.stride[0], cache.k.as<KV>(), cache.v.as<KV>(), slots.as<int64_t>(),
         cache.k.shape[0] * cache.k.shape[2], static_cast<int>(cache.k.shape[1]), static_cast<int>(cache.k.shape[2]),
         static_cast<int>(cache.k.shape[3]));
}

}  // namespace

void kv_cache_write(Stream& stream, const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache) {
  check_kv_cache_write(k, v, slots, cache);
  check_dtype("k_cache", cache.k, {DType::f32, DType::bf16});
  check_dtype("v", v, {k.dtype});
  record_kernel("kv_cache_write", "kv_cache_write_sm80_kernel");
  const bool x_f32 = k.dtype == DType::f32;
  if (cache.k.dtype == DType::f32) {
    x_f32 ? launch_write<float, float>(stream, k, v, slots, cache)
          : launch_write<bf16, float>(stream, k, v, slots, cache);
  } else {
    x_f32 ? launch_write<float, bf16>(stream, k, v, slots, cache)
          : launch_write<bf16, bf16>(stream, k, v, slots, cache);
  }
}

}  // namespace cuda
}  // namespace mxmoe
