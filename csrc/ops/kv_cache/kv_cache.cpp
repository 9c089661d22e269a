#include "ops/kv_cache/kv_cache.h"

#include "core/check.h"
#include "core/isa.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {

Dispatch<KvKernel> table("kv_cache_write", {MXMOE_X86({"kv_cache_write_avx512", kAvx512, kv_cache_write_avx512},
                                                      {"kv_cache_write_avx2", kAvx2, kv_cache_write_avx2}){
                                               "kv_cache_write_scalar", 0, kv_cache_write_scalar}});

KvRows rows_of(const Tensor& x, const Tensor& cache, const Tensor& scales, const Tensor& slots, int64_t head) {
  KvRows rows{};
  rows.x = x.data, rows.x_dtype = x.dtype, rows.x_token_stride = x.stride[0];
  rows.cache = cache.data, rows.cache_dtype = cache.dtype, rows.scales = scales.as<float>();
  rows.slots = slots.as<int64_t>(), rows.num_tokens = slots.shape[0];
  rows.head = head, rows.num_heads = cache.shape[1];
  rows.block_size = cache.shape[2], rows.head_dim = cache.shape[3];
  return rows;
}

}  // namespace

void kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache) {
  check_kv_cache_write(k, v, slots, cache);
  const int64_t heads = cache.k.shape[1], block_size = cache.k.shape[2], num_tokens = k.shape[0];
  const int64_t num_slots = cache.k.shape[0] * block_size;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t slot = slots.as<int64_t>()[t];
    check_value(slot >= 0 && slot < num_slots, "slots[", t, "] is ", slot, "; wanted 0 to ", num_slots - 1);
  }
  if (num_tokens == 0) return;
  const KvKernel kernel = table.pick();
  const auto write_head = [&](int64_t i) {
    const int64_t head = i / 2;
    kernel(i % 2 == 0 ? rows_of(k, cache.k, cache.k_scales, slots, head)
                      : rows_of(v, cache.v, cache.v_scales, slots, head));
  };
  // Threads share out heads, not tokens, so that of two tokens in one slot the later one stays.
  constexpr int64_t kTokensWorthThreads = 16;
  if (num_tokens >= kTokensWorthThreads) {
    parallel_for(2 * heads, write_head);
  } else {
    for (int64_t i = 0; i < 2 * heads; ++i) write_head(i);
  }
}

}  // namespace mxmoe
