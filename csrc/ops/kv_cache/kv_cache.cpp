#include "ops/kv_cache/kv_cache.h"

#include <cmath>

#include "core/check.h"

namespace mxmoe {
namespace {

// Writes one head of one token; returns the scale (1 unless the cache is int8).
template <typename X>
float write_head(const X* x, int64_t n, DType dtype, void* cache, int64_t at) {
  if (dtype == DType::f32) {
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(cache)[at + i] = to_float(x[i]);
    return 1.0f;
  }
  if (dtype == DType::bf16) {
    for (int64_t i = 0; i < n; ++i) static_cast<bf16*>(cache)[at + i] = to_bf16(to_float(x[i]));
    return 1.0f;
  }
  float amax = 0.0f, poison = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    amax = std::fmax(amax, std::fabs(to_float(x[i])));
    poison += to_float(x[i]) * 0.0f;  // NaN once a value is not finite
  }
  const bool usable = amax > 1e-36f && poison == 0.0f;
  const float inverse = usable ? 127.0f / amax : 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    static_cast<int8_t*>(cache)[at + i] = usable ? static_cast<int8_t>(std::nearbyint(to_float(x[i]) * inverse)) : 0;
  }
  return amax / 127.0f + poison;
}

void write_token(const Tensor& x, int64_t token, const Tensor& cache, const Tensor& scales, int64_t slot) {
  const int64_t heads = cache.shape[1], block_size = cache.shape[2], head_dim = cache.shape[3];
  const int64_t block = slot / block_size, offset = slot % block_size;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t row = (block * heads + head) * block_size + offset;
    const int64_t from = token * x.stride[0] + head * head_dim;
    const float scale = x.dtype == DType::f32
                            ? write_head(x.as<float>() + from, head_dim, cache.dtype, cache.data, row * head_dim)
                            : write_head(x.as<bf16>() + from, head_dim, cache.dtype, cache.data, row * head_dim);
    if (cache.dtype == DType::i8) scales.as<float>()[row] = scale;
  }
}

}  // namespace

void check_kv_cache(const KvCache& cache) {
  check_dtype("k_cache", cache.k, {DType::f32, DType::bf16, DType::i8});
  check_dtype("v_cache", cache.v, {cache.k.dtype});
  check_shape("k_cache", cache.k, {-1, -1, -1, -1}, "(num_blocks, num_key_value_heads, block_size, head_dim)");
  const int64_t* shape = cache.k.shape;
  check_value(shape[1] >= 1 && shape[2] >= 1 && shape[3] >= 1, "k_cache has shape ", shape_string(cache.k),
              "; wanted at least 1 head, 1 slot a block and head_dim 1");
  check_shape("v_cache", cache.v, {shape[0], shape[1], shape[2], shape[3]}, "the shape of k_cache");
  check_contiguous("k_cache", cache.k);
  check_contiguous("v_cache", cache.v);
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
  check_kv_cache(cache);
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
  for (int64_t t = 0; t < num_tokens; ++t) {
    write_token(k, t, cache.k, cache.k_scales, slots.as<int64_t>()[t]);
    write_token(v, t, cache.v, cache.v_scales, slots.as<int64_t>()[t]);
  }
}

}  // namespace mxmoe
