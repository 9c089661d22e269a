#include "core/check.h"
#include "ops/kv_cache/kv_cache.h"

namespace mxmoe {

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

void check_kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& slots, const KvCache& cache) {
  check_kv_cache_shape(cache);
  check_contiguous("k_cache", cache.k);
  check_contiguous("v_cache", cache.v);
  check_dtype("k", k, {DType::f32, DType::bf16});
  check_dtype("v", v, {DType::f32, DType::bf16});
  check_dtype("slots", slots, {DType::i64});
  const int64_t heads = cache.k.shape[1], head_dim = cache.k.shape[3];
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
}

}  // namespace mxmoe
