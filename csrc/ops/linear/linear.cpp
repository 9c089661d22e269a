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
                       {MXMOE_X86({"linear_bf16_bf16_avx512bf16", kAvx512Dot, &linear_bf16_bf16_avx512x},
                                  {"linear_bf16_bf16_avx512", kAvx512, &linear_avx512.bf16_bf16},
                                  {"linear_bf16_bf16_avx2", kAvx2, &linear_avx2.bf16_bf16}){
                           "linear_bf16_bf16_scalar", 0, &linear_scalar.bf16_bf16}});
Dispatch<Fn> f32_int8("linear_f32_int8", {MXMOE_X86({"linear_f32_int8_avx512", kAvx512, &linear_avx512.f32_int8},
                                                    {"linear_f32_int8_avx2", kAvx2, &linear_avx2.f32_int8}){
                                             "linear_f32_int8_scalar", 0, &linear_scalar.f32_int8}});
Dispatch<Fn> bf16_int8("linear_bf16_int8",
                       {MXMOE_X86({"linear_bf16_int8_avx512bf16", kAvx512Dot, &linear_bf16_int8_avx512x},
                                  {"linear_bf16_int8_avx512", kAvx512, &linear_avx512.bf16_int8},
                                  {"linear_bf16_int8_avx2", kAvx2, &linear_avx2.bf16_int8}){
                           "linear_bf16_int8_scalar", 0, &linear_scalar.bf16_int8}});
Dispatch<Fn> int8_int8("linear_int8_int8",
                       {MXMOE_X86({"linear_int8_int8_avx512vnni", kAvx512Dot, &linear_int8_int8_avx512x},
                                  {"linear_int8_int8_avx512", kAvx512, &linear_avx512.int8_int8},
                                  {"linear_int8_int8_avx2", kAvx2, &linear_avx2.int8_int8}){
                           "linear_int8_int8_scalar", 0, &linear_scalar.int8_int8}});

// Weights packed by panels have three axes, and are never int8: codes are raised.
bool is_packed(const Tensor& weight) { return weight.ndim == 3 && weight.dtype != DType::i8; }

const LinearKernel& pick(Activations activations, DType weight) {
  if (weight == DType::bf16) return activations == Activations::f32 ? *f32_bf16.pick() : *bf16_bf16.pick();
  if (activations == Activations::f32) return *f32_int8.pick();
  return activations == Activations::bf16 ? *bf16_int8.pick() : *int8_int8.pick();
}

// What the arguments of a layer are called in errors.
struct Names {
  std::string weight = "weight", scales = "scales", bias = "bias";
};

Names names_of(int64_t layer) {
  const std::string index = "[" + std::to_string(layer) + "]";
  return {"weight" + index, "scales" + index, "bias" + index};
}

// The weight's layout; returns out_features.
int64_t check_weight(const Names& names, const LinearWeights& w, int64_t in_features) {
  const char *weight = names.weight.c_str(), *scales = names.scales.c_str();
  const bool packed = is_packed(w.weight);
  check_dtype(weight, w.weight, {DType::bf16, packed ? DType::u8 : DType::i8});
  if (packed) {
    check_value(in_features % kMxBlock == 0, weight, " is packed with in_features ", in_features,
                "; wanted a multiple of ", kMxBlock);
    check_shape(weight, w.weight, {-1, in_features / kMxBlock, kPackedInt8Bytes},
                "(out_features / 16, in_features / 32, 512)");
    check_contiguous(weight, w.weight);
  } else {
    check_shape(weight, w.weight, {-1, in_features}, "(out_features, in_features)");
  }
  const int64_t out_features = w.weight.shape[0] * (packed ? kPanelRows : 1);
  if (w.weight.dtype == DType::bf16) {
    check_value(!w.scales, scales, " came with bfloat16 weights; wanted none");
    return out_features;
  }
  check_value(in_features % kMxBlock == 0, weight, " is int8 with in_features ", in_features,
              "; wanted a multiple of ", kMxBlock);
  check_value(static_cast<bool>(w.scales), weight, " is int8 but ", scales,
              " is missing; wanted (out_features, in_features / 32)");
  check_dtype(scales, w.scales, {DType::bf16});
  if (packed) {
    check_shape(scales, w.scales, {w.weight.shape[0], in_features / kMxBlock, kPanelRows},
                "(out_features / 16, in_features / 32, 16)");
    check_contiguous(scales, w.scales);
  } else {
    check_shape(scales, w.scales, {out_features, in_features / kMxBlock}, "(out_features, in_features / 32)");
  }
  return out_features;
}

// All of a layer but y; returns out_features.
int64_t check_layer(const Names& names, const LinearWeights& w, int64_t in_features, const Tensor& y) {
  const int64_t out_features = check_weight(names, w, in_features);
  if (w.bias) {
    check_dtype(names.bias.c_str(), w.bias, {DType::f32, DType::bf16});
    check_shape(names.bias.c_str(), w.bias, {out_features}, "(out_features,)");
    check_no_overlap("out", y, names.bias.c_str(), w.bias);
  }
  check_no_overlap("out", y, names.scales.c_str(), w.scales);
  check_no_overlap("out", y, names.weight.c_str(), w.weight);
  return out_features;
}

void check_x(const Tensor& x) {
  check_dtype("x", x, {DType::f32, DType::bf16});
  check_shape("x", x, {-1, -1}, "(num_tokens, in_features)");
  check_value(x.shape[1] >= 1, "x has in_features 0; wanted at least 1");
}

void check_y(const Tensor& x, int64_t out_features, const Tensor& residual, const Tensor& y) {
  check_dtype("out", y, {DType::f32});
  check_shape("out", y, {x.shape[0], out_features}, "(num_tokens, out_features)");
  if (residual) {
    check_dtype("residual", residual, {DType::f32});
    check_shape("residual", residual, {x.shape[0], out_features}, "(num_tokens, out_features)");
    const bool in_place = residual.data == y.data && residual.stride[0] == y.stride[0];
    if (!in_place) check_no_overlap("out", y, "residual", residual);
  }
  check_no_overlap("out", y, "x", x);
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
    tile.weight = {w.weight.data, w.scales.data, w.weight.stride[0] * dtype_size(w.weight.dtype),
                   w.scales.stride[0] * 2, is_packed(w.weight)};
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
  const PreparedRows rows = take_prepared(scratch, num_tokens, in_features, kernel.value_bytes, kernel.block_floats);
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

// Layers that round x alike share the rounded rows; the items of all make one list. Sizes are those of `check_layer`.
void run(const Tensor& x, const LinearWeights* layers, const std::vector<int64_t>& sizes, Activations activations,
         const Tensor& residual, const Tensor& y) {
  const int64_t num_tokens = x.shape[0], in_features = x.shape[1];
  int64_t all_rows = 0;
  size_t bytes = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const LinearKernel& kernel = pick(activations, layers[i].weight.dtype);
    bytes += prepared_bytes(num_tokens, in_features, kernel.value_bytes, kernel.block_floats);
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
  static const Names names;
  check_x(x);
  const int64_t out_features = check_layer(names, w, x.shape[1], y);
  check_y(x, out_features, residual, y);
  run(x, &w, {out_features}, activations, residual, y);
}

void linear_group(const Tensor& x, const std::vector<LinearWeights>& layers, Activations activations,
                  const Tensor& y) {
  check_x(x);
  check_value(!layers.empty(), "layers is empty; wanted at least one");
  std::vector<int64_t> sizes;
  int64_t out_features = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    sizes.push_back(check_layer(names_of(static_cast<int64_t>(i)), layers[i], x.shape[1], y));
    out_features += sizes.back();
  }
  check_y(x, out_features, {}, y);
  run(x, layers.data(), sizes, activations, {}, y);
}

}  // namespace mxmoe
