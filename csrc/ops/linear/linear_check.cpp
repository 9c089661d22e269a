#include <string>

#include "core/check.h"
#include "core/packed.h"
#include "ops/linear/linear.h"

namespace mxmoe {
namespace {

// Weights packed by panels have three axes, and are never int8: codes are raised.
bool is_packed(const Tensor& weight) { return weight.ndim == 3 && weight.dtype != DType::i8; }

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

}  // namespace

int64_t check_linear(const Tensor& x, const LinearWeights& w, const Tensor& residual, const Tensor& y) {
  static const Names names;
  check_x(x);
  const int64_t out_features = check_layer(names, w, x.shape[1], y);
  check_y(x, out_features, residual, y);
  return out_features;
}

std::vector<int64_t> check_linear_group(const Tensor& x, const std::vector<LinearWeights>& layers, const Tensor& y) {
  check_x(x);
  check_value(!layers.empty(), "layers is empty; wanted at least one");
  std::vector<int64_t> sizes;
  int64_t out_features = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    sizes.push_back(check_layer(names_of(static_cast<int64_t>(i)), layers[i], x.shape[1], y));
    out_features += sizes.back();
  }
  check_y(x, out_features, {}, y);
  return sizes;
}

}  // namespace mxmoe
