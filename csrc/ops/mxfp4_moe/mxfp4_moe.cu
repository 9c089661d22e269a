#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <algorithm>

#include "core/check.h"
#include "cuda/arena.h"
#include "cuda/launch.h"
#include "ops/mxfp4_moe/mxfp4_moe_product.cuh"

namespace mxmoe {
namespace cuda {
namespace {

using moe::Groups;
using moe::Product;

// Bounds the scratch: a token of 20b takes 4 x (2880 x 2 + 2880 x 4) bytes.
constexpr int64_t kTokensAtOnce = 2048;

// Pieces of one block of scratch, aligned for any access.
class Pieces {
 public:
  template <typename T>
  size_t add(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kDeviceAlign - 1) / kDeviceAlign * kDeviceAlign;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

struct Call {
  Stream& stream;
  const Tensor &x, &topk_ids, &topk_weights;
  const MoeWeights& weights;
  const MoeParams& params;
  const Tensor &residual, &y;
  bool rounded;
  int64_t k() const { return topk_ids.shape[1]; }
  int64_t hidden() const { return x.shape[1]; }
  int64_t intermediate() const { return weights.gate_up_blocks.shape[1] / 2; }
};

// How many pairs a tile takes: enough for a batch's share of an expert, since each tile reads its weights anew.
int tile_pairs(const Call& c, int64_t num_tokens) {
  if (!c.rounded || num_tokens <= 16) return 8;
  return num_tokens <= 128 ? 16 : 64;
}

void set_matrix(Product& p, const Tensor& blocks, const Tensor& scales, const Tensor& bias) {
  p.blocks = blocks.as<uint8_t>(), p.scales = scales.as<uint8_t>();
  if (bias.dtype == DType::f32) p.bias_f32 = bias.as<float>();
  if (bias.dtype == DType::bf16) p.bias_bf16 = bias.as<bf16>();
  p.rows = static_cast<int>(blocks.shape[1]), p.k_blocks = static_cast<int>(blocks.shape[2]);
}

template <bool kGateUp, typename X>
void multiply_exactly(const Call& c, const Product& p, const Groups& groups) {
  record_kernel("mxfp4_moe", "mxfp4_moe_f32_mxfp4_sm80_kernel");
  const int outputs = kGateUp ? p.rows / 2 : p.rows;
  launch(moe::mxfp4_moe_f32_mxfp4_sm80_kernel<kGateUp, X>,
         dim3(grid_size(ceil_div(outputs, moe::kWarps)), grid_depth(groups.max_tiles)), moe::kThreads, 0, c.stream,
         p);
}

template <bool kGateUp, typename X>
void multiply(const Call& c, const Product& p, const Groups& groups) {
  record_kernel("mxfp4_moe", "mxfp4_moe_bf16_mxfp4_sm80_kernel");
  const dim3 grid(grid_size(p.rows / moe::kTileRows), grid_depth(groups.max_tiles));
  const auto run = [&](auto kernel, size_t shared) { launch(kernel, grid, moe::kThreads, shared, c.stream, p); };
  if (groups.tile_pairs == 8) {
    run(moe::mxfp4_moe_bf16_mxfp4_sm80_kernel<1, kGateUp, X>, moe::shared_bytes<1>());
  } else if (groups.tile_pairs == 16) {
    run(moe::mxfp4_moe_bf16_mxfp4_sm80_kernel<2, kGateUp, X>, moe::shared_bytes<2>());
  } else {
    run(moe::mxfp4_moe_bf16_mxfp4_sm80_kernel<8, kGateUp, X>, moe::shared_bytes<8>());
  }
}

// Tokens [first, first + count).
void run_tokens(const Call& c, int64_t first, int64_t count) {
  const int64_t pairs = count * c.k(), num_experts = c.weights.gate_up_blocks.shape[0];
  Groups groups{};
  groups.ids = c.topk_ids.as<int32_t>() + first * c.k();
  groups.num_pairs = static_cast<int>(pairs), groups.experts_per_token = static_cast<int>(c.k());
  groups.first_expert = static_cast<int>(c.params.first_expert), groups.num_experts = static_cast<int>(num_experts);
  groups.tile_pairs = tile_pairs(c, count);
  // Each expert's last tile may be short; no tile is empty.
  groups.max_tiles = static_cast<int>(std::min(pairs, pairs / groups.tile_pairs + num_experts));

  Pieces pieces;
  const size_t order = pieces.add<int32_t>(pairs), place = pieces.add<int32_t>(pairs);
  const size_t tiles = pieces.add<int32_t>(3 * groups.max_tiles);
  const size_t hidden = pieces.add<float>(pairs * c.intermediate()), rows = pieces.add<float>(pairs * c.hidden());
  char* scratch = static_cast<char*>(c.stream.workspace(pieces.bytes(), "mxfp4_moe's intermediate results"));
  groups.order = reinterpret_cast<int32_t*>(scratch + order);
  groups.place = reinterpret_cast<int32_t*>(scratch + place);
  groups.tile_expert = reinterpret_cast<int32_t*>(scratch + tiles);
  groups.tile_begin = groups.tile_expert + groups.max_tiles, groups.tile_end = groups.tile_begin + groups.max_tiles;
  if (pairs > 0) {
    launch(moe::mxfp4_moe_group_sm80_kernel, 1, moe::kGroupThreads, 2 * (moe::kMaxExperts + 1) * sizeof(int),
           c.stream, groups);
    Product p{};
    set_matrix(p, c.weights.gate_up_blocks, c.weights.gate_up_scales, c.weights.gate_up_bias);
    p.order = groups.order, p.tile_expert = groups.tile_expert;
    p.tile_begin = groups.tile_begin, p.tile_end = groups.tile_end;
    p.alpha = c.params.swiglu_alpha, p.limit = c.params.swiglu_limit;
    p.x = c.x.as<char>() + first * c.x.stride[0] * dtype_size(c.x.dtype), p.x_stride = c.x.stride[0];
    p.pairs_per_row = groups.experts_per_token, p.y = scratch + hidden;
    if (c.x.dtype == DType::f32) {
      c.rounded ? multiply<true, float>(c, p, groups) : multiply_exactly<true, float>(c, p, groups);
    } else {
      c.rounded ? multiply<true, bf16>(c, p, groups) : multiply_exactly<true, bf16>(c, p, groups);
    }
    p.bias_f32 = nullptr, p.bias_bf16 = nullptr;
    set_matrix(p, c.weights.down_blocks, c.weights.down_scales, c.weights.down_bias);
    p.x = scratch + hidden, p.x_stride = c.intermediate(), p.pairs_per_row = 0, p.y = scratch + rows;
    c.rounded ? multiply<false, bf16>(c, p, groups) : multiply_exactly<false, float>(c, p, groups);
  }
  moe::Combine combine{};
  combine.rows = reinterpret_cast<float*>(scratch + rows), combine.place = groups.place;
  combine.weights = c.topk_weights.as<float>() + first * c.k();
  if (c.residual) {
    combine.residual = c.residual.as<float>() + first * c.residual.stride[0];
    combine.residual_stride = c.residual.stride[0];
  }
  combine.y = c.y.as<float>() + first * c.y.stride[0], combine.y_stride = c.y.stride[0];
  combine.experts_per_token = groups.experts_per_token, combine.hidden_size = static_cast<int>(c.hidden());
  launch(moe::mxfp4_moe_combine_sm80_kernel,
         dim3(grid_size(count), grid_depth(ceil_div(c.hidden(), moe::kCombineThreads))), moe::kCombineThreads, 0,
         c.stream, combine);
}

}  // namespace

void mxfp4_moe(Stream& stream, const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights,
               const MoeWeights& weights, const MoeParams& params, const Tensor& residual, const Tensor& y) {
  check_mxfp4_moe(x, topk_ids, topk_weights, weights, params, residual, y);
  check_value(params.activations != Activations::i8, "activations is 'int8'; wanted 'float32' or 'bf16' on a GPU");
  check_value(
      weights.gate_up_blocks.shape[3] == kMxBlockBytes,
      "gate_up_blocks is packed for a CPU; wanted (num_experts, 2 * intermediate_size, hidden_size / 32, 16)");
  check_value(weights.gate_up_blocks.shape[0] <= moe::kMaxExperts, "gate_up_blocks holds ",
              weights.gate_up_blocks.shape[0], " experts; wanted at most ", moe::kMaxExperts);
  check_value(topk_ids.shape[1] <= moe::kMaxExperts, "topk_ids has ", topk_ids.shape[1],
              " experts a token; wanted at most ", moe::kMaxExperts);
  check_value(params.first_expert <= INT32_MAX, "first_expert is ", params.first_expert, "; wanted at most ",
              INT32_MAX);
  for (const NamedTensor& t :
       {NamedTensor{"gate_up_blocks", weights.gate_up_blocks}, NamedTensor{"down_blocks", weights.down_blocks}}) {
    check_value(reinterpret_cast<uintptr_t>(t.tensor.data) % sizeof(uint32_t) == 0, t.name,
                " is not aligned to 4 bytes");
  }
  const Call call{
      stream, x, topk_ids, topk_weights, weights, params, residual, y, params.activations == Activations::bf16};
  for (int64_t first = 0; first < x.shape[0]; first += kTokensAtOnce) {
    run_tokens(call, first, std::min(kTokensAtOnce, x.shape[0] - first));
  }
}

}  // namespace cuda
}  // namespace mxmoe
