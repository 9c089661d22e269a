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
  ptx::release_next_kernel();
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
  launch(kv_cache_write_sm80_kernel<X, KV>, dim3(grid_size(k.shape[0]), 2), kThreads, 0, stream, Order::Dependent,
         k.as<X>(), k.stride[0], v.as<X>(), v.stride[0], cache.k.as<KV>(), cache.v.as<KV>(), slots.as<int64_t>(),
         cache.k.shape[0] * cache.k.shape[2], static_cast<int>(cache.k.shape[1]), static_cast<int>(cache.k.shape[2]),
         static_cast<int>(cache.k.shape[3]));
}

// A warp a token, head and side: a head's codes and their scale, with the CPU's bits. A NaN or an infinity makes the
// scale NaN, a row too small to have a reciprocal becomes zeros.
template <typename X>
__device__ __forceinline__ void write_int8_row(const X* from, int8_t* to, float* scale, int head_dim) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float largest = 0.0f, not_finite = 0.0f;
  for (int d = lane; d < head_dim; d += kWarp) {
    const float x = widen(from[d]);
    largest = fmaxf(largest, fabsf(x)), not_finite = __fadd_rn(not_finite, __fmul_rn(x, 0.0f));
  }
  const float amax = warp_max(largest);
  not_finite = warp_sum(not_finite);
  const bool usable = amax > 1e-36f && not_finite == 0.0f;
  const float inverse = usable ? 127.0f / amax : 0.0f;
  for (int d = lane; d < head_dim; d += kWarp) {
    to[d] = static_cast<int8_t>(usable ? __float2int_rn(__fmul_rn(widen(from[d]), inverse)) : 0);
  }
  if (lane == 0) *scale = __fadd_rn(amax / 127.0f, not_finite);
}

template <typename X>
__global__ void __launch_bounds__(kThreads)
    kv_cache_write_int8_sm80_kernel(const X* k, int64_t k_stride, const X* v, int64_t v_stride, int8_t* k_cache,
                                    int8_t* v_cache, float* k_scales, float* v_scales, const int64_t* slots,
                                    int64_t num_slots, int num_heads, int block_size, int head_dim) {
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  const int64_t slot = slots[blockIdx.x];
  if (slot < 0 || slot >= num_slots) return;
  const bool keys = blockIdx.y == 0;
  const X* from = keys ? k + blockIdx.x * k_stride : v + blockIdx.x * v_stride;
  for (int head = static_cast<int>(threadIdx.x) / kWarp; head < num_heads; head += kThreads / kWarp) {
    const int64_t row = (slot / block_size * num_heads + head) * block_size + slot % block_size;
    write_int8_row(from + int64_t{head} * head_dim, (keys ? k_cache : v_cache) + row * head_dim,
                   (keys ? k_scales : v_scales) + row, head_dim);
  }
}

template <typename X>
void launch_int8_write(Stream& stream, const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache) {
  record_kernel("kv_cache_write", "kv_cache_write_int8_sm80_kernel");
  launch(kv_cache_write_int8_sm80_kernel<X>, dim3(grid_size(k.shape[0]), 2), kThreads, 0, stream, Order::Dependent,
         k.as<X>(), k.stride[0], v.as<X>(), v.stride[0], cache.k.as<int8_t>(), cache.v.as<int8_t>(),
         cache.k_scales.as<float>(), cache.v_scales.as<float>(), slots.as<int64_t>(),
         cache.k.shape[0] * cache.k.shape[2], static_cast<int>(cache.k.shape[1]), static_cast<int>(cache.k.shape[2]),
         static_cast<int>(cache.k.shape[3]));
}

struct AdvanceTable {
  const int32_t* blocks;
  int64_t* slots;
  int64_t max_blocks;
};
struct AdvanceTables {
  AdvanceTable of[kMaxTables];
  int count;
};

// A thread a sequence.
__global__ void __launch_bounds__(kThreads)
    kv_cache_advance_sm80_kernel(int32_t* seq_lens, int64_t* positions, int64_t num_sequences, AdvanceTables tables,
                                 int64_t block_size) {
  const int64_t s = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  if (s >= num_sequences) return;
  const int64_t position = seq_lens[s], place = position / block_size;
  seq_lens[s] = static_cast<int32_t>(position + 1);
  positions[s] = position;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kMaxTables); ++i) {
    if (i >= tables.count) continue;
    const AdvanceTable& t = tables.of[i];
    const bool fits = position >= 0 && place < t.max_blocks;
    const int64_t block = fits ? t.blocks[s * t.max_blocks + place] : -1;
    t.slots[s] = block >= 0 ? block * block_size + position % block_size : -1;
  }
}

}  // namespace

void kv_cache_advance(Stream& stream, const Tensor& seq_lens, const Tensor& positions,
                      const std::vector<SlotTable>& tables, int64_t block_size) {
  check_dtype("seq_lens", seq_lens, {DType::i32});
  check_dtype("positions", positions, {DType::i64});
  check_shape("seq_lens", seq_lens, {-1}, "(num_sequences,)");
  const int64_t n = seq_lens.shape[0];
  check_shape("positions", positions, {n}, "(num_sequences,)");
  check_value(block_size >= 1, "block_size is ", block_size, "; wanted 1 or more");
  check_value(!tables.empty() && tables.size() <= kMaxTables, "there are ", tables.size(),
              " block tables; wanted 1 to ", kMaxTables);
  AdvanceTables all{};
  for (const SlotTable& t : tables) {
    check_dtype("block_table", t.block_table, {DType::i32});
    check_dtype("slots", t.slots, {DType::i64});
    check_shape("block_table", t.block_table, {n, -1}, "(num_sequences, max_blocks)");
    check_contiguous("block_table", t.block_table);
    check_shape("slots", t.slots, {n}, "(num_sequences,)");
    check_no_overlap("slots", t.slots,
                     {{"block_table", t.block_table}, {"seq_lens", seq_lens}, {"positions", positions}});
    all.of[all.count++] = {t.block_table.as<int32_t>(), t.slots.as<int64_t>(), t.block_table.shape[1]};
  }
  check_no_overlap("positions", positions, "seq_lens", seq_lens);
  record_kernel("kv_cache_advance", "kv_cache_advance_sm80_kernel");
  launch(kv_cache_advance_sm80_kernel, dim3(grid_size(ceil_div(n, kThreads))), kThreads, 0, stream, Order::Dependent,
         seq_lens.as<int32_t>(), positions.as<int64_t>(), n, all, block_size);
}

void kv_cache_write(Stream& stream, const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache) {
  check_kv_cache_write(k, v, slots, cache);
  check_dtype("v", v, {k.dtype});
  if (cache.k.dtype == DType::i8) {
    return k.dtype == DType::f32 ? launch_int8_write<float>(stream, k, v, slots, cache)
                                 : launch_int8_write<bf16>(stream, k, v, slots, cache);
  }
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
