#include "ops/linear/linear.h"

#include <algorithm>

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

// The weight's layout; returns out_features.
int64_t check_weight(const Tensor& weight, const Tensor& scales, int64_t in_features) {
  const bool packed = is_packed(weight);
  check_dtype("weight", weight, {DType::bf16, packed ? DType::u8 : DType::i8});
  if (packed) {
    check_value(in_features % kMxBlock == 0, "weight is packed with in_features ", in_features,
                "; wanted a multiple of ", kMxBlock);
    check_shape("weight", weight, {-1, in_features / kMxBlock, kPackedInt8Bytes},
                "(out_features / 16, in_features / 32, 512)");
    check_contiguous("weight", weight);
  } else {
    check_shape("weight", weight, {-1, in_features}, "(out_features, in_features)");
  }
  const int64_t out_features = weight.shape[0] * (packed ? kPanelRows : 1);
  if (weight.dtype == DType::bf16) {
    check_value(!scales, "scales came with bfloat16 weights; wanted none");
    return out_features;
  }
  check_value(in_features % kMxBlock == 0, "weight is int8 with in_features ", in_features, "; wanted a multiple of ",
              kMxBlock);
  check_value(static_cast<bool>(scales),
              "weight is int8 but scales is missing; wanted (out_features, in_features / 32)");
  check_dtype("scales", scales, {DType::bf16});
  if (packed) {
    check_shape("scales", scales, {weight.shape[0], in_features / kMxBlock, kPanelRows},
                "(out_features / 16, in_features / 32, 16)");
    check_contiguous("scales", scales);
  } else {
    check_shape("scales", scales, {out_features, in_features / kMxBlock}, "(out_features, in_features / 32)");
  }
  return out_features;
}

void check(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& bias, const Tensor& residual,
           const Tensor& y) {
  check_dtype("x", x, {DType::f32, DType::bf16});
  check_shape("x", x, {-1, -1}, "(num_tokens, in_features)");
  const int64_t num_tokens = x.shape[0], in_features = x.shape[1];
  check_value(in_features >= 1, "x has in_features 0; wanted at least 1");
  const int64_t out_features = check_weight(weight, scales, in_features);
  check_dtype("out", y, {DType::f32});
  check_shape("out", y, {num_tokens, out_features}, "(num_tokens, out_features)");
  check_no_overlap("out", y, "scales", scales);
  if (bias) {
    check_dtype("bias", bias, {DType::f32, DType::bf16});
    check_shape("bias", bias, {out_features}, "(out_features,)");
    check_no_overlap("out", y, "bias", bias);
  }
  if (residual) {
    check_dtype("residual", residual, {DType::f32});
    check_shape("residual", residual, {num_tokens, out_features}, "(num_tokens, out_features)");
    const bool in_place = residual.data == y.data && residual.stride[0] == y.stride[0];
    if (!in_place) check_no_overlap("out", y, "residual", residual);
  }
  check_no_overlap("out", y, "x", x);
  check_no_overlap("out", y, "weight", weight);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void linear(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& bias, Activations activations,
            const Tensor& residual, const Tensor& y) {
  check(x, weight, scales, bias, residual, y);
  const int64_t num_tokens = x.shape[0], in_features = x.shape[1];
  const bool packed = is_packed(weight);
  const int64_t out_features = weight.shape[0] * (packed ? kPanelRows : 1);
  if (num_tokens == 0 || out_features == 0) return;

  const LinearKernel& kernel = pick(activations, weight.dtype);
  Scratch scratch(prepared_bytes(num_tokens, in_features, kernel.value_bytes, kernel.block_floats));
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

  // A tile's tokens stay in the second-level cache while the weight rows go past them.
  constexpr int64_t kTokensPerTile = 192;
  const int64_t m_tiles = ceil_div(num_tokens, kTokensPerTile);
  const int64_t rows_per_tile = tile_rows(out_features * m_tiles);
  const int64_t n_tiles = ceil_div(out_features, rows_per_tile);
  parallel_for(n_tiles * m_tiles, [&](int64_t item) {
    const int64_t n = item / m_tiles * rows_per_tile, m = item % m_tiles * kTokensPerTile;
    LinearTile tile{};
    tile.x = rows;
    tile.m_begin = m, tile.m_end = std::min(m + kTokensPerTile, num_tokens);
    tile.weight = {weight.data, scales.data, weight.stride[0] * dtype_size(weight.dtype), scales.stride[0] * 2,
                   packed};
    tile.n_begin = n, tile.n_end = std::min(n + rows_per_tile, out_features);
    tile.in_features = in_features;
    if (bias && bias.dtype == DType::f32) tile.bias_f32 = bias.as<float>();
    if (bias && bias.dtype == DType::bf16) tile.bias_bf16 = bias.as<bf16>();
    tile.residual = residual ? residual.as<float>() : nullptr;
    tile.residual_stride = residual.stride[0];
    tile.y = y.as<float>(), tile.y_stride = y.stride[0];
    kernel.tile(tile);
  });
}

}  // namespace mxmoe
