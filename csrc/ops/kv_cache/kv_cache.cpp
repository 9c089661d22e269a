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

void check_kv_cache_shape(const KvCache& cache) {
  check_dtype("k_cache", cache.k, {DType::f32, DType::bf16, DType::i8});
  check_dtype("v_cache", cache.v, {cache.k.dtype});
  check_shape("k_cache", cache.k, {-1, -1, -1, -1}, "(num_blocks, num_key_value_heads, block_size, head_dim)");
  const int64_t* shape = cache.k.shape;
  check_value(shape[1] >= 1 && shape[2] >= 1 && shape[3] >= 1, "k_cache has shape ", shape_string(cache.k),
              "; wanted at least 1 head, 1 slot a block and head_dim 1");
  check_shape("v_cache", cache.v, {shape[0], shape[1], shape[2], shape[3]}, "the shape of k_cache");
  const std::pair<const char*, const Tensor*> scales[] = {{"k_scales", &cache.k_scales},
                                                          {"v_scales", &cache.v_scales}};
  for (const auto& [name, t] : scales) {
    if (cache.k.dtype != DType::i8) {
      check_value(!*t, name, " came with a ", dtype_name(cache.k.dtype), " cache; wanted none");
      continue;
    }
    check_value(static_cast<bool>(*t), name,
                " is missing; an int8 cache wants (num_blocks, heads, block_size) float32");
    check_dtype(name, *t, {DType::f32});
    check_shape(name, *t, {shape[0], shape[1], shape[2]}, "(num_blocks, num_key_value_heads, block_size)");
    check_contiguous(name, *t);
  }
}

void kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache) {
  check_kv_cache_shape(cache);
  check_contiguous("k_cache", cache.k);
  check_contiguous("v_cache", cache.v);
  check_dtype("k", k, {DType::f32, DType::bf16});
  check_dtype("v", v, {DType::f32, DType::bf16});
  check_dtype("slots", slots, {DType::i64});
  const int64_t heads = cache.k.shape[1], block_size = cache.k.shape[2], head_dim = cache.k.shape[3];
  check_shape("k", k, {-1, heads, head_dim}, "(num_tokens, num_key_value_heads, head_dim)");
  const int64_t num_tokens = k.shape[0];
  check_shape("v", v, {num_tokens, heads, head_dim}, "(num_tokens, num_key_value_heads, head_dim)");
  check_shape("slots", slots, {num_tokens}, "(num_tokens,)");
  for (const auto* t : {&k, &v}) {
    check_value(heads <= 1 || t->stride[1] == head_dim, t == &k ? "k" : "v", " has a head stride of ", t->stride[1],
                " elements; wanted ", head_dim);
  }
  check_no_overlap("k_cache", cache.k,
                   {{"v_cache", cache.v}, {"k_scales", cache.k_scales}, {"v_scales", cache.v_scales}});
  check_no_overlap("v_cache", cache.v, {{"k_scales", cache.k_scales}, {"v_scales", cache.v_scales}});
  check_no_overlap("k_scales", cache.k_scales, "v_scales", cache.v_scales);
  for (const NamedTensor& written :
       {NamedTensor{"k_cache", cache.k}, NamedTensor{"v_cache", cache.v}, NamedTensor{"k_scales", cache.k_scales},
        NamedTensor{"v_scales", cache.v_scales}}) {
    check_no_overlap(written.name, written.tensor, {{"k", k}, {"v", v}, {"slots", slots}});
  }
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
