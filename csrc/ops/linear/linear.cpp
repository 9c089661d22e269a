#include "ops/linear/linear.h"

#include <algorithm>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "core/prepared.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {

using Fn = const LinearKernel*;
Dispatch<Fn> f32_bf16("linear_f32_bf16", {MXMOE_X86({"linear_f32_bf16_avx512", kAvx512, &linear_avx512.f32_bf16},
                                                    {"linear_f32_bf16_avx2", kAvx2, &linear_avx2.f32_bf16}){
                                             "linear_f32_bf16_scalar", 0, &linear_scalar.f32_bf16}});
Dispatch<Fn> bf16_bf16("linear_bf16_bf16",
                       {MXMOE_X86({"linear_bf16_bf16_avx512bf16", kAvx512Bf16Dot, &linear_bf16_bf16_avx512x},
                                  {"linear_bf16_bf16_avx512", kAvx512, &linear_avx512.bf16_bf16},
                                  {"linear_bf16_bf16_avx2", kAvx2, &linear_avx2.bf16_bf16}){
                           "linear_bf16_bf16_scalar", 0, &linear_scalar.bf16_bf16}});
Dispatch<Fn> f32_int8("linear_f32_int8", {MXMOE_X86({"linear_f32_int8_avx512", kAvx512, &linear_avx512.f32_int8},
                                                    {"linear_f32_int8_avx2", kAvx2, &linear_avx2.f32_int8}){
                                             "linear_f32_int8_scalar", 0, &linear_scalar.f32_int8}});
Dispatch<Fn> bf16_int8("linear_bf16_int8",
                       {MXMOE_X86({"linear_bf16_int8_avx512bf16", kAvx512Bf16Dot, &linear_bf16_int8_avx512x},
                                  {"linear_bf16_int8_avx512vnni", kAvx512VnniDot, &linear_bf16_int8_avx512vnni},
                                  {"linear_bf16_int8_avx512", kAvx512, &linear_avx512.bf16_int8},
                                  {"linear_bf16_int8_avxvnni", kAvx2 | kAvxVnni, &linear_bf16_int8_avxvnni},
                                  {"linear_bf16_int8_avx2", kAvx2, &linear_avx2.bf16_int8}){
                           "linear_bf16_int8_scalar", 0, &linear_scalar.bf16_int8}});
Dispatch<Fn> int8_int8("linear_int8_int8",
                       {MXMOE_X86({"linear_int8_int8_avx512vnni", kAvx512VnniDot, &linear_int8_int8_avx512vnni},
                                  {"linear_int8_int8_avx512", kAvx512, &linear_avx512.int8_int8},
                                  {"linear_int8_int8_avxvnni", kAvx2 | kAvxVnni, &linear_int8_int8_avxvnni},
                                  {"linear_int8_int8_avx2", kAvx2, &linear_avx2.int8_int8}){
                           "linear_int8_int8_scalar", 0, &linear_scalar.int8_int8}});

// Weights packed by panels have three axes, and are never int8: codes are raised.
bool is_packed(const Tensor& weight) { return weight.ndim == 3 && weight.dtype != DType::i8; }

const LinearKernel& pick(Activations activations, DType weight) {
  if (weight == DType::bf16) return activations == Activations::f32 ? *f32_bf16.pick() : *bf16_bf16.pick();
  if (activations == Activations::f32) return *f32_int8.pick();
  return activations == Activations::bf16 ? *bf16_int8.pick() : *int8_int8.pick();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile's tokens stay in the second-level cache while the weight rows go past them.
constexpr int64_t kTokensPerTile = 192;

// One layer on rounded activations, cut into items.
struct Layer {
  const LinearWeights& w;
  const LinearKernel& kernel;
  PreparedRows rows;
  int64_t num_tokens, in_features, out_features, rows_per_tile;
  const Tensor& residual;
  float* y;  // of the first token and this layer's first feature
  int64_t y_stride;

  int64_t m_tiles() const { return ceil_div(num_tokens, kTokensPerTile); }
  int64_t items() const { return m_tiles() * ceil_div(out_features, rows_per_tile); }

  void run(int64_t item) const {
    const int64_t n = item / m_tiles() * rows_per_tile, m = item % m_tiles() * kTokensPerTile;
    LinearTile tile{};
    tile.x = rows;
    tile.m_begin = m, tile.m_end = std::min(m + kTokensPerTile, num_tokens);
    const int64_t value_bytes = dtype_size(w.weight.dtype), scale_bytes = dtype_size(DType::bf16);
    tile.weight = {w.weight.data,
                   w.scales.data,
                   w.weight.stride[0] * value_bytes,
                   w.scales.stride[0] * scale_bytes,
                   is_packed(w.weight),
                   w.weight.stride[1] * value_bytes,
                   w.scales.stride[1] * scale_bytes};
    tile.n_begin = n, tile.n_end = std::min(n + rows_per_tile, out_features);
    tile.in_features = in_features;
    if (w.bias && w.bias.dtype == DType::f32) tile.bias_f32 = w.bias.as<float>();
    if (w.bias && w.bias.dtype == DType::bf16) tile.bias_bf16 = w.bias.as<bf16>();
    tile.residual = residual ? residual.as<float>() : nullptr;
    tile.residual_stride = residual.stride[0];
    tile.y = y, tile.y_stride = y_stride;
    kernel.tile(tile);
  }
};

PreparedRows prepare_rows(const Tensor& x, const LinearKernel& kernel, Scratch& scratch) {
  const int64_t num_tokens = x.shape[0], in_features = x.shape[1];
  const PreparedRows rows = take_prepared(scratch, num_tokens, in_features, kernel);
  const auto prepare = [&](int64_t t) {
    if (x.dtype == DType::f32) {
      kernel.prepare.f32(x.as<float>() + t * x.stride[0], in_features, rows, t);
    } else {
      kernel.prepare.b16(x.as<bf16>() + t * x.stride[0], in_features, rows, t);
    }
  };
  if (num_tokens < 8) {
    for (int64_t t = 0; t < num_tokens; ++t) prepare(t);  // not worth waking a thread
  } else {
    parallel_for(num_tokens, prepare);
  }
  return rows;
}

// Layers that round x alike share the rounded rows; the items of all make one list. Sizes are those of
// `check_linear_group`.
void run(const Tensor& x, const LinearWeights* layers, const std::vector<int64_t>& sizes, Activations activations,
         const Tensor& residual, const Tensor& y) {
  const int64_t num_tokens = x.shape[0], in_features = x.shape[1];
  int64_t all_rows = 0;
  size_t bytes = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const LinearKernel& kernel = pick(activations, layers[i].weight.dtype);
    bytes += prepared_bytes(num_tokens, in_features, kernel);
    all_rows += sizes[i];
  }
  if (num_tokens == 0 || all_rows == 0) return;
  Scratch scratch(bytes);
  std::vector<Layer> all;
  all.reserve(sizes.size());
  const int64_t rows = all_rows * ceil_div(num_tokens, kTokensPerTile);
  float* to = y.as<float>();
  for (size_t i = 0; i < sizes.size(); ++i) {
    const LinearKernel& kernel = pick(activations, layers[i].weight.dtype);
    const auto same = std::find_if(all.begin(), all.end(), [&](const Layer& l) { return &l.kernel == &kernel; });
    const PreparedRows prepared = same == all.end() ? prepare_rows(x, kernel, scratch) : same->rows;
    all.push_back({layers[i], kernel, prepared, num_tokens, in_features, sizes[i], tile_rows(rows, kernel.row_step),
                   residual, to, y.stride[0]});
    to += sizes[i];
  }
  int64_t items = 0;
  for (const Layer& layer : all) items += layer.items();
  parallel_for(items, [&](int64_t item) {
    const Layer* layer = all.data();
    for (; item >= layer->items(); ++layer) item -= layer->items();
    layer->run(item);
  });
}

}  // namespace

void linear(const Tensor& x, const LinearWeights& w, Activations activations, const Tensor& residual,
            const Tensor& y) {
  run(x, &w, {check_linear(x, w, residual, y)}, activations, residual, y);
}

void linear_group(const Tensor& x, const std::vector<LinearWeights>& layers, Activations activations,
                  const Tensor& y) {
  run(x, layers.data(), check_linear_group(x, layers, y), activations, {}, y);
}

}  // namespace mxmoe
