#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <algorithm>

#include "core/check.h"
#include "cuda/arena.h"
#include "cuda/launch.h"
#include "ops/mxfp4_moe/mxfp4_moe_few_sm90.cuh"
#include "ops/mxfp4_moe/mxfp4_moe_many_sm80.cuh"
#include "ops/mxfp4_moe/mxfp4_moe_many_sm90.cuh"

namespace mxmoe {
namespace cuda {
namespace {

using moe::Combine;
using moe::Groups;
using moe::Product;

// Bounds the scratch: a token of 20b takes 4 x (2880 x 2 + 2880 x 4) bytes.
constexpr int64_t kTokensAtOnce = 4096;

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
  bool rounded, hopper;
  int64_t k() const { return topk_ids.shape[1]; }
  int64_t hidden() const { return x.shape[1]; }
  int64_t intermediate() const { return weights.gate_up_blocks.shape[1] / 2; }
};

// How many pairs a tile takes: enough for a batch's share of an expert, since each tile reads its weights anew.
int tile_pairs(const Call& c, int64_t num_tokens) {
  const int64_t share = num_tokens * c.k() / c.weights.gate_up_blocks.shape[0];
  if (c.hopper && num_tokens * c.k() > moe::kFewPairs) return share <= 64 ? 64 : 128;
  if (c.hopper) return num_tokens <= 8 || share <= 4 ? 8 : share <= 9 ? 16 : 32;
  if (!c.rounded || num_tokens <= 16) return 8;
  return num_tokens * c.k() <= moe::kFewPairs ? 16 : moe::many_sm80::kPairs;
}

void set_matrix(Product& p, const Tensor& blocks, const Tensor& scales, const Tensor& bias) {
  p.blocks = blocks.as<uint8_t>(), p.scales = scales.as<uint8_t>();
  p.bias_f32 = bias.dtype == DType::f32 ? bias.as<float>() : nullptr;
  p.bias_bf16 = bias.dtype == DType::bf16 ? bias.as<bf16>() : nullptr;
  p.rows = static_cast<int>(blocks.shape[1]), p.k_blocks = static_cast<int>(blocks.shape[2]);
}

// One of the two products, so many weight rows to a block.
template <typename Kernel>
void run(const Call& c, const Product& p, Kernel kernel, int64_t block_rows, int threads, size_t shared) {
  const Groups& groups = p.groups;
  const dim3 grid(grid_size(ceil_div(p.rows, block_rows)),
                  grid_depth(groups.order == nullptr ? moe::few_blocks(groups) : groups.max_tiles));
  launch(kernel, grid, threads, shared, c.stream, Order::Dependent, p);
}

template <bool kGateUp, typename X>
void multiply_exactly(const Call& c, const Product& p) {
  record_kernel("mxfp4_moe", "mxfp4_moe_f32_mxfp4_sm80_kernel");
  run(c, p, moe::mxfp4_moe_f32_mxfp4_sm80_kernel<kGateUp, X>, kGateUp ? 2 * moe::kWarps : moe::kWarps, moe::kThreads,
      moe::kListBytes);
}

template <bool kGateUp, typename X>
void multiply(const Call& c, const Product& p) {
  record_kernel("mxfp4_moe", "mxfp4_moe_bf16_mxfp4_few_sm80_kernel");
  const auto with = [&](auto kernel, size_t shared) { run(c, p, kernel, moe::kTileRows, moe::kThreads, shared); };
  if (p.groups.tile_pairs == 8) {
    with(moe::mxfp4_moe_bf16_mxfp4_few_sm80_kernel<1, kGateUp, X>, moe::shared_bytes<1>());
  } else {
    with(moe::mxfp4_moe_bf16_mxfp4_few_sm80_kernel<2, kGateUp, X>, moe::shared_bytes<2>());
  }
}

template <bool kGateUp, typename X>
void multiply_few(const Call& c, const Product& p) {
  record_kernel("mxfp4_moe", "mxfp4_moe_bf16_mxfp4_few_sm90_kernel");
  const auto with = [&](auto kernel, size_t shared) { run(c, p, kernel, moe::kGroupRows, moe::kFewThreads, shared); };
  if (p.groups.tile_pairs == 8) {
    with(moe::mxfp4_moe_bf16_mxfp4_few_sm90_kernel<8, kGateUp, X>, moe::few_shared_bytes<8>());
  } else if (p.groups.tile_pairs == 16) {
    with(moe::mxfp4_moe_bf16_mxfp4_few_sm90_kernel<16, kGateUp, X>, moe::few_shared_bytes<16>());
  } else {
    with(moe::mxfp4_moe_bf16_mxfp4_few_sm90_kernel<32, kGateUp, X>, moe::few_shared_bytes<32>());
  }
}

template <bool kGateUp>
void multiply_many(const Call& c, const Product& p) {
  if (!c.hopper) {
    record_kernel("mxfp4_moe", "mxfp4_moe_bf16_mxfp4_many_sm80_kernel");
    return run(c, p, moe::many_sm80::mxfp4_moe_bf16_mxfp4_many_sm80_kernel<kGateUp>, moe::many_sm80::kBlockRows,
               moe::many_sm80::kBlockThreads, moe::many_sm80::shared_bytes());
  }
  record_kernel("mxfp4_moe", "mxfp4_moe_bf16_mxfp4_many_sm90_kernel");
  const auto with = [&](auto kernel, size_t shared) { run(c, p, kernel, moe::kManyRows, moe::kManyThreads, shared); };
  if (p.groups.tile_pairs == 64) {
    with(moe::mxfp4_moe_bf16_mxfp4_many_sm90_kernel<64, kGateUp>, moe::many_shared_bytes<64>());
  } else {
    with(moe::mxfp4_moe_bf16_mxfp4_many_sm90_kernel<128, kGateUp>, moe::many_shared_bytes<128>());
  }
}

// Rounds x for the kernels of many pairs: on Hopper by places, in whole steps.
template <typename X>
void arrange(const Call& c, int64_t num_tokens, const X* x, void* arranged) {
  const auto k = static_cast<int>(c.hidden());
  const dim3 grid(grid_size(num_tokens), grid_depth(ceil_div(moe::padded(k) / 8, moe::kRoundThreads)));
  if (c.hopper) {
    launch(moe::mxfp4_moe_arrange_sm90_kernel<X>, grid, moe::kRoundThreads, 0, c.stream, Order::Dependent, x,
           c.x.stride[0], k, static_cast<uint32_t*>(arranged));
  } else {
    launch(moe::mxfp4_moe_round_sm80_kernel<X>, grid, moe::kRoundThreads, 0, c.stream, Order::Dependent, x,
           c.x.stride[0], k, static_cast<uint4*>(arranged));
  }
}

// The products of rows of X; `arranged` is room for those rows by places.
template <typename X>
void multiply_both(const Call& c, Product p, int64_t num_tokens, const X* x, void* arranged, void* hidden,
                   float* rows, const Combine& combine) {
  const bool few = p.groups.order == nullptr;
  set_matrix(p, c.weights.gate_up_blocks, c.weights.gate_up_scales, c.weights.gate_up_bias);
  p.x = x, p.x_stride = c.x.stride[0], p.pairs_per_row = p.groups.experts_per_token, p.y = hidden;
  if (c.rounded && !few) {
    arrange(c, num_tokens, x, arranged);
    p.x = arranged, p.x_stride = c.hopper ? moe::padded(c.hidden()) : c.hidden();
    multiply_many<true>(c, p);
  } else if (c.hopper) {
    multiply_few<true, X>(c, p);
  } else {
    c.rounded ? multiply<true, X>(c, p) : multiply_exactly<true, X>(c, p);
  }
  set_matrix(p, c.weights.down_blocks, c.weights.down_scales, c.weights.down_bias);
  p.x = hidden, p.x_stride = c.hopper ? moe::padded(c.intermediate()) : c.intermediate();
  p.pairs_per_row = 1, p.y = rows, p.combine = combine;
  if (few) {
    const int64_t block_rows = c.hopper ? moe::kGroupRows : c.rounded ? moe::kTileRows : moe::kWarps;
    p.combine.arrived = c.stream.counters(static_cast<size_t>(ceil_div(p.rows, block_rows)));
  }
  if (c.rounded && !few) {
    multiply_many<false>(c, p);
  } else if (c.hopper) {
    multiply_few<false, void>(c, p);
  } else {
    c.rounded ? multiply<false, bf16>(c, p) : multiply_exactly<false, float>(c, p);
  }
}

// Tokens [first, first + count).
void run_tokens(const Call& c, int64_t first, int64_t count) {
  const int64_t pairs = count * c.k(), num_experts = c.weights.gate_up_blocks.shape[0];
  const bool few = pairs <= moe::kFewPairs;
  Product p{};
  Groups& groups = p.groups;
  groups.ids = c.topk_ids.as<int32_t>() + first * c.k();
  groups.num_pairs = static_cast<int>(pairs), groups.experts_per_token = static_cast<int>(c.k());
  groups.first_expert = static_cast<int>(c.params.first_expert), groups.num_experts = static_cast<int>(num_experts);
  groups.tile_pairs = tile_pairs(c, count);
  // Each expert's last tile may be short; no tile is empty.
  groups.max_tiles = static_cast<int>(std::min(pairs, pairs / groups.tile_pairs + num_experts));
  p.alpha = c.params.swiglu_alpha, p.limit = c.params.swiglu_limit;

  Pieces pieces;
  const size_t order = pieces.add<int32_t>(pairs), tiles = pieces.add<int32_t>(3 * groups.max_tiles);
  const size_t arranged = pieces.add<bf16>(c.rounded && !few ? count * moe::padded(c.hidden()) : 0);
  const size_t hidden = c.rounded ? pieces.add<bf16>(pairs * moe::padded(c.intermediate()))
                                  : pieces.add<float>(pairs * c.intermediate());
  const size_t rows = pieces.add<float>(pairs * c.hidden());
  char* scratch = static_cast<char*>(c.stream.workspace(pieces.bytes(), "mxfp4_moe's intermediate results"));
  if (!few) {
    groups.order = reinterpret_cast<int32_t*>(scratch + order);
    groups.tile_expert = reinterpret_cast<int32_t*>(scratch + tiles);
    groups.tile_begin = groups.tile_expert + groups.max_tiles, groups.tile_end = groups.tile_begin + groups.max_tiles;
    launch(moe::mxfp4_moe_group_sm80_kernel, 1, moe::kGroupThreads, 2 * (moe::kMaxExperts + 1) * sizeof(int),
           c.stream, Order::Dependent, groups);
  }
  Combine combine{};
  combine.rows = reinterpret_cast<float*>(scratch + rows);
  combine.weights = c.topk_weights.as<float>() + first * c.k();
  if (c.residual) {
    combine.residual = c.residual.as<float>() + first * c.residual.stride[0];
    combine.residual_stride = c.residual.stride[0];
  }
  combine.y = c.y.as<float>() + first * c.y.stride[0], combine.y_stride = c.y.stride[0];
  combine.num_tokens = static_cast<int>(count), combine.hidden_size = static_cast<int>(c.hidden());
  if (pairs > 0) {
    const auto both = [&](auto* x) {
      multiply_both(c, p, count, x + first * c.x.stride[0], scratch + arranged, scratch + hidden,
                    reinterpret_cast<float*>(scratch + rows), combine);
    };
    c.x.dtype == DType::f32 ? both(c.x.as<float>()) : both(c.x.as<bf16>());
  }
  if (few && pairs > 0) return;  // summed already
  launch(moe::mxfp4_moe_combine_sm80_kernel,
         dim3(grid_size(count), grid_depth(ceil_div(c.hidden(), moe::kCombineThreads))), moe::kCombineThreads, 0,
         c.stream, Order::Dependent, combine, groups);
}

bool aligned(const Tensor& t, size_t bytes) { return reinterpret_cast<uintptr_t>(t.data) % bytes == 0; }

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
    check_value(aligned(t.tensor, sizeof(uint32_t)), t.name, " is not aligned to 4 bytes");
  }
  const bool rounded = params.activations == Activations::bf16;
  const bool hopper = rounded && params.foldable_scales && aligned(weights.gate_up_blocks, kMxBlockBytes) &&
                      aligned(weights.down_blocks, kMxBlockBytes) && on_hopper(stream.device());
  const Call call{stream, x, topk_ids, topk_weights, weights, params, residual, y, rounded, hopper};
  for (int64_t first = 0; first < x.shape[0]; first += kTokensAtOnce) {
    run_tokens(call, first, std::min(kTokensAtOnce, x.shape[0] - first));
  }
}

}  // namespace cuda
}  // namespace mxmoe
