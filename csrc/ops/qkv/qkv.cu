#include "ops/qkv/qkv.h"

#include <cmath>

#include "core/check.h"
#include "cuda/launch.h"
#include "ops/linear/linear_gemv.cuh"
#include "ops/rmsnorm/rmsnorm.h"
#include "ops/rmsnorm/rmsnorm_row.cuh"
#include "ops/rope/rope_pair.cuh"

namespace mxmoe {
namespace cuda {
namespace {

using namespace linear_mma;

struct Projection {
  const bf16* weight;
  int64_t stride;
  const float* bias_f32;
  const bf16* bias_bf16;
};

struct Qkv {
  const void* x;
  int64_t x_stride, num_tokens, hidden_size;
  const bf16* norm_weight;
  float eps;
  Projection q, k, v;
  const float *cos, *sin;
  const int64_t* positions;
  int64_t max_positions;
  const int64_t* slots;
  int64_t num_slots;
  void *q_out, *k_cache, *v_cache;
  int64_t q_stride;
  int num_heads, num_kv_heads, block_size, head_dim;
};

// The rows' normalised values to shared memory, as `stage` brings what needs no norm. `parts`: kParts floats a token.
__device__ __forceinline__ StagedTokens stage_normed(const Qkv& r, const GlobalTokens<float>& from, float* parts,
                                                     bf16* to) {
  const int64_t n = r.hidden_size;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const StagedTokens staged{to, staged_stride(n), n, static_cast<int>(min(int64_t{kTileTokens}, from.tokens_left))};
#pragma unroll 2
  for (int i = warp; i < staged.tokens * norm::kParts; i += kGemvWarps) {
    const float* row = from.x + i / norm::kParts * from.stride;
    const float sum = norm::part_of_squares(row, n, from.aligned, i % norm::kParts);
    if (threadIdx.x % kWarp == 0) parts[i] = sum;
  }
  __syncthreads();
  const bool weight_aligned = aligned_to(r.norm_weight, 8);
  for (int token = 0; token < staged.tokens; ++token) {
    const float* row = from.x + token * from.stride;
    const float inverse = norm::inverse_of(parts + token * norm::kParts, n, r.eps);
    for (int64_t i = 8 * int64_t{threadIdx.x}; i < n; i += 8 * kGemvThreads) {
      const float4 a =
          norm::scaled(load4(row, i, n, from.aligned), inverse, load4(r.norm_weight, i, n, weight_aligned));
      const float4 b =
          norm::scaled(load4(row, i + 4, n, from.aligned), inverse, load4(r.norm_weight, i + 4, n, weight_aligned));
      *reinterpret_cast<uint4*>(to + token * staged.stride + i) = make_uint4(
          ptx::pack_bf16(a.x, a.y), ptx::pack_bf16(a.z, a.w), ptx::pack_bf16(b.x, b.y), ptx::pack_bf16(b.z, b.w));
    }
  }
  __syncthreads();
  return staged;
}

// Value d of a head of a token to where it belongs.
template <typename KV>
__device__ __forceinline__ void put(const Qkv& r, int64_t token, int head, int d, float value, bool known) {
  if (head < r.num_heads) {
    KV* q = static_cast<KV*>(r.q_out) + token * r.q_stride + int64_t{head} * r.head_dim;
    q[d] = narrow<KV>(known ? value : quiet_nan());
    return;
  }
  const int64_t slot = r.slots[token];
  if (!known || slot < 0 || slot >= r.num_slots) return;
  const int kv_head = (head - r.num_heads) % r.num_kv_heads;
  KV* cache = static_cast<KV*>(head < r.num_heads + r.num_kv_heads ? r.k_cache : r.v_cache);
  const int64_t row = (slot / r.block_size * r.num_kv_heads + kv_head) * r.block_size + slot % r.block_size;
  cache[row * r.head_dim + d] = narrow<KV>(value);
}

// grid: (eight pairs of a head's values, group of tokens). Row g of a tile is value d0 + g of the head, row g + 8
// the one it is rotated with. kNorm: x is the float32 residual stream, else bfloat16 and normalised.
template <int kTiles, bool kNorm, typename KV>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<kNorm>) rmsnorm_qkv_rope_sm80_kernel(Qkv r) {
  float* sums = reinterpret_cast<float*>(ptx::dynamic_shared());  // [slice][tile][lane][4]
  const int half = r.head_dim / 2, pieces = half / 8, g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int head = static_cast<int>(blockIdx.x) / pieces, d0 = static_cast<int>(blockIdx.x) % pieces * 8;
  const bool is_q = head < r.num_heads, is_v = head >= r.num_heads + r.num_kv_heads;
  const Projection layer = is_q ? r.q : is_v ? r.v : r.k;
  const int first_row = (is_q ? head : (head - r.num_heads) % r.num_kv_heads) * r.head_dim + d0;
  const GemvRows rows{layer.weight + (first_row + g) * layer.stride,
                      layer.weight + (first_row + g + half) * layer.stride};
  GemvWeights weights;
  fetch_first_weights(weights, rows, r.hidden_size);
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();

  const int64_t token0 = int64_t{blockIdx.y} * kTiles * kTileTokens;
  float totals[kTiles];
  if constexpr (kNorm) {
    static_assert(kTiles == 1, "what is staged is one tile");
    const GlobalTokens<float> tokens{static_cast<const float*>(r.x) + token0 * r.x_stride, r.x_stride, r.hidden_size,
                                     r.num_tokens - token0, rows_aligned(static_cast<const float*>(r.x), r.x_stride)};
    float* parts = sums + gemv_shared_bytes<1>() / sizeof(float);
    bf16* to = reinterpret_cast<bf16*>(parts + kTileTokens * norm::kParts);
    gemv_sums<kTiles, true>(weights, rows, r.hidden_size, stage_normed(r, tokens, parts, to), sums, totals);
  } else {
    const GlobalTokens<bf16> tokens{static_cast<const bf16*>(r.x) + token0 * r.x_stride, r.x_stride, r.hidden_size,
                                    r.num_tokens - token0, true};
    gemv_sums<kTiles, true>(weights, rows, r.hidden_size, tokens, sums, totals);
  }
  const GemvElement element = own_element();
  const int pair = d0 + element.row % 8, feature = first_row + element.row % 8 + element.row / 8 * half;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t token = token0 + i * kTileTokens + element.token;
    float own = totals[i];
    if (layer.bias_f32 != nullptr) own = __fadd_rn(own, layer.bias_f32[feature]);
    if (layer.bias_bf16 != nullptr) own = __fadd_rn(own, widen(layer.bias_bf16[feature]));
    const float other = __shfl_xor_sync(kAllLanes, own, 2);  // the pair's other value: see own_element
    if (token >= r.num_tokens) continue;
    const int64_t position = r.positions[token];
    const bool known = position >= 0 && position < r.max_positions;
    if (!is_v) {
      const int64_t at = (known ? position : 0) * half + pair;
      const bool low = element.row < 8;
      const float2 turned = rotate(low ? own : other, low ? other : own, r.cos[at], r.sin[at]);
      own = low ? turned.x : turned.y;
    }
    put<KV>(r, token, head, pair + element.row / 8 * half, own, known);
  }
}

template <int kTiles, bool kNorm>
void launch_qkv(Stream& stream, const Qkv& r, DType kv) {
  const int pieces = r.head_dim / 16;
  const dim3 grid(grid_size(int64_t{pieces} * (r.num_heads + 2 * r.num_kv_heads)),
                  grid_depth(ceil_div(r.num_tokens, kTiles * kTileTokens)));
  size_t shared = gemv_shared_bytes<kTiles>();
  if (kNorm) {
    shared += sizeof(float) * kTileTokens * norm::kParts +
              sizeof(bf16) * static_cast<size_t>(r.num_tokens * staged_stride(r.hidden_size));
  }
  record_kernel("rmsnorm_qkv_rope", "rmsnorm_qkv_rope_sm80_kernel");
  launch(kv == DType::f32 ? rmsnorm_qkv_rope_sm80_kernel<kTiles, kNorm, float>
                          : rmsnorm_qkv_rope_sm80_kernel<kTiles, kNorm, bf16>,
         grid, kGemvThreads, shared, stream, Order::Dependent, r);
}

// What needs no more than the arrays' own shapes and dtypes.
void check_layer(const char* name, const char* bias_name, const LinearWeights& w, int64_t rows, int64_t hidden_size) {
  check_dtype(name, w.weight, {DType::bf16});
  check_shape(name, w.weight, {rows, hidden_size}, "(heads * head_dim, hidden_size)");
  check_value(reinterpret_cast<uintptr_t>(w.weight.data) % 16 == 0 && w.weight.stride[0] % 8 == 0, name,
              " has rows that are not aligned to 16 bytes");
  if (!w.bias) return;
  check_dtype(bias_name, w.bias, {DType::f32, DType::bf16});
  check_shape(bias_name, w.bias, {rows}, "(heads * head_dim,)");
  check_contiguous(bias_name, w.bias);
}

void check_tables(const RopeTables& tables, const Tensor& slots, int64_t num_tokens, int64_t head_dim) {
  for (const NamedTensor& t : {NamedTensor{"cos", tables.cos}, NamedTensor{"sin", tables.sin}}) {
    check_dtype(t.name, t.tensor, {DType::f32});
    check_shape(t.name, t.tensor, {tables.cos.shape[0], head_dim / 2}, "(max_positions, head_dim / 2)");
    check_contiguous(t.name, t.tensor);
  }
  check_value(tables.cos.shape[0] >= 1, "cos has no rows; wanted at least 1");
  for (const NamedTensor& t : {NamedTensor{"positions", tables.positions}, NamedTensor{"slots", slots}}) {
    check_dtype(t.name, t.tensor, {DType::i64});
    check_shape(t.name, t.tensor, {num_tokens}, "(num_tokens,)");
    check_contiguous(t.name, t.tensor);
  }
}

void check_qkv(const Tensor& x, const QkvLayers& layers, const RopeTables& tables, const Tensor& slots,
               const KvCache& cache, const Tensor& q) {
  check_kv_cache_shape(cache);
  check_dtype("k_cache", cache.k, {DType::f32, DType::bf16});
  check_dtype("x", x, {DType::f32});
  check_dtype("norm_weight", layers.norm_weight, {DType::bf16});
  check_dtype("q", q, {cache.k.dtype});
  check_shape("x", x, {-1, -1}, "(num_tokens, hidden_size)");
  const int64_t num_tokens = x.shape[0], hidden_size = x.shape[1];
  const int64_t kv_heads = cache.k.shape[1], head_dim = cache.k.shape[3];
  check_value(hidden_size >= 8 && hidden_size % 8 == 0, "x has hidden_size ", hidden_size,
              "; wanted a multiple of 8");
  check_value(head_dim >= 16 && head_dim % 16 == 0, "k_cache has head_dim ", head_dim, "; wanted a multiple of 16");
  check_shape("norm_weight", layers.norm_weight, {hidden_size}, "(hidden_size,)");
  check_contiguous("norm_weight", layers.norm_weight);
  check_value(std::isfinite(layers.eps) && layers.eps >= 0.0f, "eps is ", layers.eps,
              "; wanted a finite number, 0 or more");
  check_shape("q", q, {num_tokens, -1, head_dim}, "(num_tokens, num_attention_heads, head_dim)");
  check_value(q.shape[1] >= 1 && (q.shape[1] == 1 || q.stride[1] == head_dim), "q has ", q.shape[1],
              " heads at a stride of ", q.stride[1], "; wanted 1 or more, ", head_dim, " apart");
  check_layer("q_weight", "q_bias", layers.q, q.shape[1] * head_dim, hidden_size);
  check_layer("k_weight", "k_bias", layers.k, kv_heads * head_dim, hidden_size);
  check_layer("v_weight", "v_bias", layers.v, kv_heads * head_dim, hidden_size);
  check_tables(tables, slots, num_tokens, head_dim);
  for (const NamedTensor& t : {NamedTensor{"k_cache", cache.k}, NamedTensor{"v_cache", cache.v}}) {
    check_contiguous(t.name, t.tensor);
  }
  for (const NamedTensor& t :
       {NamedTensor{"q", q}, NamedTensor{"k_cache", cache.k}, NamedTensor{"v_cache", cache.v}}) {
    check_no_overlap(
        t.name, t.tensor,
        {{"x", x}, {"norm_weight", layers.norm_weight}, {"positions", tables.positions}, {"slots", slots}});
  }
  check_no_overlap("q", q, {{"k_cache", cache.k}, {"v_cache", cache.v}});
  check_no_overlap("k_cache", cache.k, "v_cache", cache.v);
}

Projection projection(const LinearWeights& w) {
  Projection p{w.weight.as<bf16>(), w.weight.stride[0], nullptr, nullptr};
  if (w.bias && w.bias.dtype == DType::f32) p.bias_f32 = w.bias.as<float>();
  if (w.bias && w.bias.dtype == DType::bf16) p.bias_bf16 = w.bias.as<bf16>();
  return p;
}

Qkv describe(const Tensor& x, const QkvLayers& layers, const RopeTables& tables, const Tensor& slots,
             const KvCache& cache, const Tensor& q) {
  Qkv r{};
  r.x = x.data, r.x_stride = x.stride[0], r.num_tokens = x.shape[0], r.hidden_size = x.shape[1];
  r.norm_weight = layers.norm_weight.as<bf16>(), r.eps = layers.eps;
  r.q = projection(layers.q), r.k = projection(layers.k), r.v = projection(layers.v);
  r.cos = tables.cos.as<float>(), r.sin = tables.sin.as<float>(), r.positions = tables.positions.as<int64_t>();
  r.max_positions = tables.cos.shape[0];
  r.slots = slots.as<int64_t>(), r.num_slots = cache.k.shape[0] * cache.k.shape[2];
  r.q_out = q.data, r.q_stride = q.stride[0], r.k_cache = cache.k.data, r.v_cache = cache.v.data;
  r.num_heads = static_cast<int>(q.shape[1]), r.num_kv_heads = static_cast<int>(cache.k.shape[1]);
  r.block_size = static_cast<int>(cache.k.shape[2]), r.head_dim = static_cast<int>(cache.k.shape[3]);
  return r;
}

}  // namespace

void rmsnorm_qkv_rope(Stream& stream, const Tensor& x, const QkvLayers& layers, const RopeTables& tables,
                      const Tensor& slots, const KvCache& cache, const Tensor& q) {
  check_qkv(x, layers, tables, slots, cache, q);
  if (x.shape[0] == 0) return;
  Qkv r = describe(x, layers, tables, slots, cache, q);
  const int64_t staged = r.num_tokens * staged_stride(r.hidden_size) * static_cast<int64_t>(sizeof(bf16));
  if (r.num_tokens <= kTileTokens && staged <= kMaxStagedBytes) return launch_qkv<1, true>(stream, r, cache.k.dtype);
  Tensor h;
  h.dtype = DType::bf16, h.ndim = 2;
  h.shape[0] = r.num_tokens, h.shape[1] = r.hidden_size, h.stride[0] = r.hidden_size, h.stride[1] = 1;
  h.data = stream.workspace(static_cast<size_t>(h.size()) * sizeof(bf16), "rmsnorm_qkv_rope's normalised rows");
  rmsnorm(stream, x, layers.norm_weight, layers.eps, h);
  r.x = h.data, r.x_stride = h.stride[0];
  if (r.num_tokens <= kTileTokens) return launch_qkv<1, false>(stream, r, cache.k.dtype);
  if (r.num_tokens <= 2 * kTileTokens) return launch_qkv<2, false>(stream, r, cache.k.dtype);
  launch_qkv<4, false>(stream, r, cache.k.dtype);
}

}  // namespace cuda
}  // namespace mxmoe
