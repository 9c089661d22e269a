#include "ops/linear/linear.h"

#include "core/check.h"
#include "cuda/launch.h"
#include "ops/linear/linear_gemm.cuh"
#include "ops/linear/linear_gemv.cuh"

namespace mxmoe {
namespace cuda {
namespace {

using linear_mma::Epilogue;
using linear_mma::kGemvThreads;
using linear_mma::kTileRows;
using linear_mma::kTileTokens;

// Nothing rounded: a warp a weight row, for up to 8 tokens; lanes take K by fours, and one tree adds them up.
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTokens = 8;

template <typename X>
__global__ void __launch_bounds__(kThreads)
    linear_f32_bf16_sm80_kernel(const X* x, int64_t x_stride, int64_t num_tokens, const bf16* weight,
                                int64_t weight_stride, int64_t out_features, int64_t k, Epilogue epilogue) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, token0 = int64_t{blockIdx.y} * kTokens;
  ptx::release_next_kernel();
  if (row >= out_features) return;
  ptx::wait_for_previous_kernel();
  const bf16* weights = weight + row * weight_stride;
  const bool weight_aligned = aligned_to(weights, 8);
  const bool x_aligned = aligned_to(x, 16) && x_stride * static_cast<int64_t>(sizeof(X)) % 16 == 0;
  float sums[kTokens] = {};
  for (int64_t i = 4 * lane; i < k; i += 4 * kWarp) {
    const float4 w = load4(weights, i, k, weight_aligned);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (token0 + t >= num_tokens) continue;
      const float4 v = load4(x + (token0 + t) * x_stride, i, k, x_aligned);
      sums[t] = add_products(sums[t], v, w);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (token0 + t >= num_tokens) continue;
    const float sum = warp_sum(sums[t]);
    if (lane == 0) finish(epilogue, token0 + t, row, sum);
  }
}

// x to bfloat16 rows whose stride suits 16-byte accesses.
__global__ void __launch_bounds__(kThreads)
    linear_round_sm80_kernel(const float* x, int64_t x_stride, int64_t k, bf16* rounded, int64_t rounded_stride) {
  const int64_t i = 4 * (int64_t{blockIdx.y} * kThreads + threadIdx.x);
  ptx::release_next_kernel();
  if (i >= k) return;
  ptx::wait_for_previous_kernel();
  const float* row = x + blockIdx.x * x_stride;
  store4(rounded + blockIdx.x * rounded_stride, i, k, true, load4(row, i, k, aligned_to(row, 16)));
}

struct Call {
  Stream& stream;
  const Tensor &x, &weight;
  Epilogue epilogue;
};

// Layers of the same x.
struct GemvCall {
  Stream& stream;
  const Tensor& x;
  linear_mma::GemvLayers layers;
  int64_t blocks;
};

int64_t staged_bytes(int64_t num_tokens, int64_t k) {
  return num_tokens * linear_mma::staged_stride(k) * static_cast<int64_t>(sizeof(bf16));
}

void add_layer(GemvCall& c, const Tensor& weight, const Epilogue& epilogue) {
  c.layers.of[c.layers.count++] = {weight.as<bf16>(), weight.stride[0], weight.shape[0], grid_size(c.blocks),
                                   epilogue};
  c.blocks += ceil_div(weight.shape[0], kTileRows);
}

template <int kTiles, bool kStaged, bool kWide, typename X>
void launch_gemv(const GemvCall& c) {
  const int64_t num_tokens = c.x.shape[0], k = c.x.shape[1];
  const dim3 grid(grid_size(c.blocks), grid_depth(ceil_div(num_tokens, kTiles * kTileTokens)));
  size_t shared = linear_mma::gemv_shared_bytes<kTiles>();
  if (kStaged) shared += static_cast<size_t>(staged_bytes(num_tokens, k));
  record_kernel("linear", "linear_bf16_bf16_gemv_sm80_kernel");
  launch(linear_mma::linear_bf16_bf16_gemv_sm80_kernel<kTiles, kStaged, kWide, X>, grid, kGemvThreads, shared,
         c.stream, Order::Dependent, c.x.as<X>(), c.x.stride[0], num_tokens, k, c.layers);
}

template <bool kWide, typename X>
void gemv(const GemvCall& c) {
  const int64_t num_tokens = c.x.shape[0];
  if (num_tokens > 16) return launch_gemv<4, false, kWide, X>(c);
  if (num_tokens > 8) return launch_gemv<2, false, kWide, X>(c);
  if (staged_bytes(num_tokens, c.x.shape[1]) > linear_mma::kMaxStagedBytes) {
    return launch_gemv<1, false, kWide, X>(c);
  }
  launch_gemv<1, true, kWide, X>(c);
}

// Whether every weight row is whole pieces of 16 bytes.
bool is_wide(const GemvCall& c) {
  bool wide = c.x.shape[1] % 8 == 0;
  for (int i = 0; i < c.layers.count; ++i) {
    const linear_mma::GemvLayer& layer = c.layers.of[i];
    wide = wide && reinterpret_cast<uintptr_t>(layer.weight) % 16 == 0 && layer.weight_stride % 8 == 0;
  }
  return wide;
}

template <typename X>
void gemv(const GemvCall& c) {
  is_wide(c) ? gemv<true, X>(c) : gemv<false, X>(c);
}

void gemv(const GemvCall& c) { c.x.dtype == DType::f32 ? gemv<float>(c) : gemv<bf16>(c); }

void gemm(const Call& c) {
  const int64_t num_tokens = c.x.shape[0], out_features = c.weight.shape[0], k = c.weight.shape[1];
  const bf16* x = c.x.as<bf16>();
  int64_t x_stride = c.x.stride[0];
  if (c.x.dtype == DType::f32) {
    x_stride = ceil_div(k, 8) * 8;
    auto* rounded = static_cast<bf16*>(c.stream.workspace(static_cast<size_t>(num_tokens * x_stride) * sizeof(bf16),
                                                          "linear's rounded activations"));
    launch(linear_round_sm80_kernel, dim3(grid_size(num_tokens), grid_depth(ceil_div(k, 4 * kThreads))), kThreads, 0,
           c.stream, Order::Dependent, c.x.as<float>(), c.x.stride[0], k, rounded, x_stride);
    x = rounded;
  }
  record_kernel("linear", "linear_bf16_bf16_sm80_kernel");
  launch(linear_mma::linear_bf16_bf16_sm80_kernel,
         dim3(grid_size(ceil_div(out_features, linear_mma::kGemmRows)),
              grid_depth(ceil_div(num_tokens, linear_mma::kGemmTokens))),
         linear_mma::kGemmThreads, linear_mma::kGemmSharedBytes, c.stream, Order::Dependent, x, x_stride, num_tokens,
         c.weight.as<bf16>(), c.weight.stride[0], out_features, k, c.epilogue);
}

template <typename X>
void unrounded(const Call& c) {
  const int64_t num_tokens = c.x.shape[0], out_features = c.weight.shape[0];
  record_kernel("linear", "linear_f32_bf16_sm80_kernel");
  launch(linear_f32_bf16_sm80_kernel<X>,
         dim3(grid_size(ceil_div(out_features, kWarps)), grid_depth(ceil_div(num_tokens, kTokens))), kThreads, 0,
         c.stream, Order::Dependent, c.x.as<X>(), c.x.stride[0], num_tokens, c.weight.as<bf16>(), c.weight.stride[0],
         out_features, c.weight.shape[1], c.epilogue);
}

void check_on_gpu(const char* name, const LinearWeights& w, Activations activations) {
  check_dtype(name, w.weight, {DType::bf16});
  check_value(w.weight.ndim == 2, name, " is packed for a CPU; wanted (out_features, in_features) on a GPU");
  check_value(activations != Activations::i8, "activations is 'int8'; wanted 'float32' or 'bf16' on a GPU");
}

Epilogue epilogue_of(const LinearWeights& w, const Tensor& residual, const Tensor& y) {
  Epilogue epilogue{};
  if (w.bias && w.bias.dtype == DType::f32) epilogue.bias_f32 = w.bias.as<float>();
  if (w.bias && w.bias.dtype == DType::bf16) epilogue.bias_bf16 = w.bias.as<bf16>();
  if (residual) epilogue.residual = residual.as<float>(), epilogue.residual_stride = residual.stride[0];
  epilogue.y = y.as<float>(), epilogue.y_stride = y.stride[0];
  return epilogue;
}

// Past this a block of 128 x 128 does less idle work than reading the weights again costs.
constexpr int64_t kMostGemvTokens = 64;

bool takes_gemv(const Tensor& x, Activations activations) {
  return activations != Activations::f32 && x.shape[0] <= kMostGemvTokens;
}

void run(Stream& stream, const Tensor& x, const LinearWeights& w, Activations activations, const Tensor& residual,
         const Tensor& y) {
  if (x.shape[0] == 0 || w.weight.shape[0] == 0) return;
  const Epilogue epilogue = epilogue_of(w, residual, y);
  if (takes_gemv(x, activations)) {
    GemvCall call{stream, x, {}, 0};
    add_layer(call, w.weight, epilogue);
    return gemv(call);
  }
  const Call call{stream, x, w.weight, epilogue};
  if (activations != Activations::f32) return gemm(call);
  x.dtype == DType::f32 ? unrounded<float>(call) : unrounded<bf16>(call);
}

// One launch for every few layers.
void run_side_by_side(Stream& stream, const Tensor& x, const std::vector<LinearWeights>& layers, const Tensor& y) {
  GemvCall call{stream, x, {}, 0};
  Tensor columns = y;
  for (const LinearWeights& w : layers) {
    columns.shape[1] = w.weight.shape[0];
    if (columns.shape[1] > 0) add_layer(call, w.weight, epilogue_of(w, {}, columns));
    columns.data = columns.as<float>() + columns.shape[1];
    if (call.layers.count == linear_mma::kMaxGemvLayers) {
      gemv(call);
      call.layers = {}, call.blocks = 0;
    }
  }
  if (call.layers.count > 0) gemv(call);
}

}  // namespace

void linear(Stream& stream, const Tensor& x, const LinearWeights& w, Activations activations, const Tensor& residual,
            const Tensor& y) {
  check_linear(x, w, residual, y);
  check_on_gpu("weight", w, activations);
  run(stream, x, w, activations, residual, y);
}

void linear_group(Stream& stream, const Tensor& x, const std::vector<LinearWeights>& layers, Activations activations,
                  const Tensor& y) {
  const std::vector<int64_t> sizes = check_linear_group(x, layers, y);
  for (size_t i = 0; i < layers.size(); ++i) check_on_gpu(concat("weight[", i, "]").c_str(), layers[i], activations);
  if (x.shape[0] > 0 && takes_gemv(x, activations)) return run_side_by_side(stream, x, layers, y);
  Tensor columns = y;
  for (size_t i = 0; i < layers.size(); ++i) {
    columns.shape[1] = sizes[i];
    run(stream, x, layers[i], activations, {}, columns);
    columns.data = columns.as<float>() + sizes[i];
  }
}

}  // namespace cuda
}  // namespace mxmoe
