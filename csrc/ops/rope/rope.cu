#include "ops/rope/rope.h"

#include "core/check.h"
#include "cuda/launch.h"
#include "ops/rope/rope_pair.cuh"

namespace mxmoe {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

// A warp a head; its lanes share out the pairs.
template <typename X, typename Y>
__global__ void __launch_bounds__(kThreads)
    rope_sm80_kernel(const X* x, int64_t x_stride, const float* cos, const float* sin, Y* y, int64_t y_stride,
                     int num_heads, int head_dim) {
  const int head = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  const int half = head_dim / 2;
  ptx::release_next_kernel();
  if (head >= num_heads) return;
  ptx::wait_for_previous_kernel();
  const X* from = x + blockIdx.x * x_stride + int64_t{head} * head_dim;
  Y* to = y + blockIdx.x * y_stride + int64_t{head} * head_dim;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < half; i += kWarp) {
    const float first = widen(from[i]), second = widen(from[i + half]);
    const float c = cos[int64_t{blockIdx.x} * half + i], s = sin[int64_t{blockIdx.x} * half + i];
    const float2 turned = rotate(first, second, c, s);
    to[i] = narrow<Y>(turned.x);
    to[i + half] = narrow<Y>(turned.y);
  }
}

struct RopeWrite {
  const float* qkv;
  int64_t qkv_stride;
  const float* bias_f32;
  const bf16* bias_bf16;
  const float *cos, *sin;
  const int64_t* positions;
  int64_t max_positions;
  const int64_t* slots;
  int64_t num_slots;
  int64_t q_stride;
  int num_heads, num_kv_heads, block_size, head_dim;
};

__device__ __forceinline__ float biased(const RopeWrite& r, const float* row, int64_t i) {
  const float x = row[i];
  if (r.bias_f32 != nullptr) return x + r.bias_f32[i];
  return r.bias_bf16 != nullptr ? x + widen(r.bias_bf16[i]) : x;
}

template <typename Q, typename KV>
__global__ void __launch_bounds__(kThreads) rope_kv_write_sm80_kernel(RopeWrite r, Q* q, KV* k_cache, KV* v_cache) {
  const int head = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  const int half = r.head_dim / 2, lane = static_cast<int>(threadIdx.x) % kWarp;
  ptx::release_next_kernel();
  if (head >= r.num_heads + 2 * r.num_kv_heads) return;
  ptx::wait_for_previous_kernel();
  const int64_t token = blockIdx.x, first = int64_t{head} * r.head_dim;
  const float* row = r.qkv + token * r.qkv_stride;
  const int64_t position = r.positions[token], slot = r.slots[token];
  const bool known = position >= 0 && position < r.max_positions;
  const bool held = slot >= 0 && slot < r.num_slots;
  const float* cos = r.cos + (known ? position : 0) * half;
  const float* sin = r.sin + (known ? position : 0) * half;
  const int kv_head = (head - r.num_heads) % r.num_kv_heads;
  const int64_t place =
      held ? ((slot / r.block_size * r.num_kv_heads + kv_head) * r.block_size + slot % r.block_size) * r.head_dim : 0;
  for (int i = lane; i < half; i += kWarp) {
    const float a = biased(r, row, first + i), b = biased(r, row, first + i + half);
    const float2 turned = rotate(a, b, cos[i], sin[i]);
    if (head < r.num_heads) {
      Q* to = q + token * r.q_stride + first;
      to[i] = narrow<Q>(known ? turned.x : quiet_nan());
      to[i + half] = narrow<Q>(known ? turned.y : quiet_nan());
    } else if (head < r.num_heads + r.num_kv_heads) {
      if (held && known) {
        k_cache[place + i] = narrow<KV>(turned.x);
        k_cache[place + i + half] = narrow<KV>(turned.y);
      }
    } else if (held && known) {
      v_cache[place + i] = narrow<KV>(a);
      v_cache[place + i + half] = narrow<KV>(b);
    }
  }
}

template <typename X, typename Y>
void launch_rope(Stream& stream, const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y) {
  const dim3 grid(grid_size(x.shape[0]), grid_depth(ceil_div(x.shape[1], kWarps)));
  launch(rope_sm80_kernel<X, Y>, grid, kThreads, 0, stream, Order::Dependent, x.as<X>(), x.stride[0], cos.as<float>(),
         sin.as<float>(), y.as<Y>(), y.stride[0], static_cast<int>(x.shape[1]), static_cast<int>(x.shape[2]));
}

template <typename Q, typename KV>
void launch_write(Stream& stream, dim3 grid, const RopeWrite& r, const Tensor& q, const KvCache& cache) {
  launch(rope_kv_write_sm80_kernel<Q, KV>, grid, kThreads, 0, stream, Order::Dependent, r, q.as<Q>(),
         cache.k.as<KV>(), cache.v.as<KV>());
}

void check_write(const Tensor& qkv, const Tensor& bias, const RopeTables& tables, const Tensor& slots,
                 const KvCache& cache, const Tensor& q) {
  check_kv_cache_shape(cache);
  check_contiguous("k_cache", cache.k);
  check_contiguous("v_cache", cache.v);
  check_dtype("k_cache", cache.k, {DType::f32, DType::bf16});
  const int64_t kv_heads = cache.k.shape[1], head_dim = cache.k.shape[3];
  check_value(head_dim % 2 == 0, "k_cache has head_dim ", head_dim, "; wanted an even number");
  check_dtype("qkv", qkv, {DType::f32});
  check_dtype("q", q, {DType::f32, DType::bf16});
  check_shape("qkv", qkv, {-1, -1}, "(num_tokens, (num_attention_heads + 2 num_key_value_heads) * head_dim)");
  const int64_t num_tokens = qkv.shape[0];
  check_shape("q", q, {num_tokens, -1, head_dim}, "(num_tokens, num_attention_heads, head_dim)");
  const int64_t features = (q.shape[1] + 2 * kv_heads) * head_dim;
  check_shape("qkv", qkv, {num_tokens, features},
              "(num_tokens, (num_attention_heads + 2 num_key_value_heads) * head_dim)");
  check_value(q.shape[1] <= 1 || q.stride[1] == head_dim, "q has a head stride of ", q.stride[1], "; wanted ",
              head_dim);
  if (bias) {
    check_dtype("bias", bias, {DType::f32, DType::bf16});
    check_shape("bias", bias, {features}, "a value for each feature of qkv");
  }
  for (const NamedTensor& t : {NamedTensor{"cos", tables.cos}, NamedTensor{"sin", tables.sin}}) {
    check_dtype(t.name, t.tensor, {DType::f32});
    check_shape(t.name, t.tensor, {tables.cos.shape[0], head_dim / 2}, "(max_positions, head_dim / 2)");
    check_contiguous(t.name, t.tensor);
  }
  check_value(tables.cos.shape[0] >= 1, "cos has no rows; wanted at least 1");
  for (const NamedTensor& t : {NamedTensor{"positions", tables.positions}, NamedTensor{"slots", slots}}) {
    check_dtype(t.name, t.tensor, {DType::i64});
    check_shape(t.name, t.tensor, {num_tokens}, "(num_tokens,)");
  }
  for (const NamedTensor& t :
       {NamedTensor{"q", q}, NamedTensor{"k_cache", cache.k}, NamedTensor{"v_cache", cache.v}}) {
    check_no_overlap(t.name, t.tensor,
                     {{"qkv", qkv},
                      {"bias", bias},
                      {"cos", tables.cos},
                      {"sin", tables.sin},
                      {"positions", tables.positions},
                      {"slots", slots}});
  }
  check_no_overlap("q", q, {{"k_cache", cache.k}, {"v_cache", cache.v}});
  check_no_overlap("k_cache", cache.k, "v_cache", cache.v);
}

}  // namespace

void rope(Stream& stream, const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y) {
  check_rope(x, cos, sin, y);
  record_kernel("rope", "rope_sm80_kernel");
  const bool x_f32 = x.dtype == DType::f32, y_f32 = y.dtype == DType::f32;
  if (x_f32 && y_f32) return launch_rope<float, float>(stream, x, cos, sin, y);
  if (x_f32) return launch_rope<float, bf16>(stream, x, cos, sin, y);
  if (y_f32) return launch_rope<bf16, float>(stream, x, cos, sin, y);
  launch_rope<bf16, bf16>(stream, x, cos, sin, y);
}

void rope_kv_write(Stream& stream, const Tensor& qkv, const Tensor& bias, const RopeTables& tables,
                   const Tensor& slots, const KvCache& cache, const Tensor& q) {
  check_write(qkv, bias, tables, slots, cache, q);
  RopeWrite r{};
  r.qkv = qkv.as<float>(), r.qkv_stride = qkv.stride[0];
  if (bias && bias.dtype == DType::f32) r.bias_f32 = bias.as<float>();
  if (bias && bias.dtype == DType::bf16) r.bias_bf16 = bias.as<bf16>();
  r.cos = tables.cos.as<float>(), r.sin = tables.sin.as<float>(), r.positions = tables.positions.as<int64_t>();
  r.max_positions = tables.cos.shape[0];
  r.slots = slots.as<int64_t>(), r.num_slots = cache.k.shape[0] * cache.k.shape[2];
  r.q_stride = q.stride[0];
  r.num_heads = static_cast<int>(q.shape[1]), r.num_kv_heads = static_cast<int>(cache.k.shape[1]);
  r.block_size = static_cast<int>(cache.k.shape[2]), r.head_dim = static_cast<int>(cache.k.shape[3]);
  const dim3 grid(grid_size(qkv.shape[0]), grid_depth(ceil_div(r.num_heads + 2 * r.num_kv_heads, kWarps)));
  record_kernel("rope_kv_write", "rope_kv_write_sm80_kernel");
  const bool q_f32 = q.dtype == DType::f32;
  if (cache.k.dtype == DType::f32) {
    q_f32 ? launch_write<float, float>(stream, grid, r, q, cache)
          : launch_write<bf16, float>(stream, grid, r, q, cache);
  } else {
    q_f32 ? launch_write<float, bf16>(stream, grid, r, q, cache)
          : launch_write<bf16, bf16>(stream, grid, r, q, cache);
  }
}

}  // namespace cuda
}  // namespace mxmoe
