#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <algorithm>

#include "core/check.h"
#include "core/isa.h"
#include "core/prepared.h"
#include "core/thread_pool.h"
#include "ops/expert_routing/expert_routing.h"

namespace mxmoe {
namespace {

using Fn = const MoeKernel*;
Dispatch<Fn> with_f32("mxfp4_moe_f32", {MXMOE_X86({"mxfp4_moe_f32_mxfp4_avx512", kAvx512, &mxfp4_moe_avx512.f32},
                                                  {"mxfp4_moe_f32_mxfp4_avx2", kAvx2, &mxfp4_moe_avx2.f32}){
                                           "mxfp4_moe_f32_mxfp4_scalar", 0, &mxfp4_moe_scalar.f32}});
Dispatch<Fn> with_bf16("mxfp4_moe_bf16",
                       {MXMOE_X86({"mxfp4_moe_bf16_mxfp4_avx512bf16", kAvx512Bf16Dot, &mxfp4_moe_bf16_avx512x},
                                  {"mxfp4_moe_bf16_mxfp4_avx512vnni", kAvx512VnniDot, &mxfp4_moe_bf16_avx512vnni},
                                  {"mxfp4_moe_bf16_mxfp4_avx512", kAvx512, &mxfp4_moe_avx512.bf16},
                                  {"mxfp4_moe_bf16_mxfp4_avxvnni", kAvx2 | kAvxVnni, &mxfp4_moe_bf16_avxvnni},
                                  {"mxfp4_moe_bf16_mxfp4_avx2", kAvx2, &mxfp4_moe_avx2.bf16}){
                           "mxfp4_moe_bf16_mxfp4_scalar", 0, &mxfp4_moe_scalar.bf16}});
Dispatch<Fn> with_int8("mxfp4_moe_int8",
                       {MXMOE_X86({"mxfp4_moe_int8_mxfp4_avx512vnni", kAvx512VnniDot, &mxfp4_moe_int8_avx512vnni},
                                  {"mxfp4_moe_int8_mxfp4_avx512", kAvx512, &mxfp4_moe_avx512.int8},
                                  {"mxfp4_moe_int8_mxfp4_avxvnni", kAvx2 | kAvxVnni, &mxfp4_moe_int8_avxvnni},
                                  {"mxfp4_moe_int8_mxfp4_avx2", kAvx2, &mxfp4_moe_avx2.int8}){
                           "mxfp4_moe_int8_mxfp4_scalar", 0, &mxfp4_moe_scalar.int8}});
Dispatch<CombineKernel> combine("mxfp4_moe_combine", {MXMOE_X86({"combine_avx512", kAvx512, combine_avx512},
                                                                {"combine_avx2", kAvx2, combine_avx2}){
                                                         "combine_scalar", 0, combine_scalar}});

struct Sizes {
  int64_t num_tokens, experts_per_token, num_experts, hidden_size, intermediate_size;
  bool packed;
  int64_t num_pairs() const { return num_tokens * experts_per_token; }
};

// Blocks packed by panels have sixteen rows in the last axis.
bool is_packed(const Tensor& blocks) { return blocks.ndim == 4 && blocks.shape[3] == kPackedMxfp4Bytes; }

Sizes check(const Tensor& x, const Tensor& ids, const Tensor& topk_weights, const MoeWeights& w,
            const MoeParams& params, const Tensor& residual, const Tensor& y) {
  check_mxfp4_moe(x, ids, topk_weights, w, params, residual, y);
  const bool packed = is_packed(w.gate_up_blocks);
  const int64_t gate_up_rows = w.gate_up_blocks.shape[1] * (packed ? kPanelRows : 1);
  const Sizes s{x.shape[0], ids.shape[1], w.gate_up_blocks.shape[0], x.shape[1], gate_up_rows / 2, packed};
  for (int64_t i = 0; i < s.num_pairs(); ++i) {
    check_value(ids.as<int32_t>()[i] >= 0, "topk_ids holds ", ids.as<int32_t>()[i], "; wanted 0 or more");
  }
  return s;
}

// One of the two grouped products: which activation rows go through which expert, tile by tile.
struct Grouped {
  PreparedRows x;
  const int64_t* rows;     // by sorted pair: its row in x
  const int32_t* offsets;  // by expert
  const int32_t* busy;     // the experts that have rows
  int64_t num_busy;
  const Tensor& blocks;
  const Tensor& scales;
  const Tensor& bias;
  int64_t num_rows, k;  // of an expert's matrix
  float* y;             // by sorted pair
  int64_t y_stride;
  bool packed;
};

void run_grouped(const Grouped& g, const MoeParams& params, void (*kernel)(const MoeTile&)) {
  const int64_t rows_per_tile = tile_rows(g.num_busy * g.num_rows, 2 * kPanelRows);
  const int64_t tiles = (g.num_rows + rows_per_tile - 1) / rows_per_tile;
  parallel_for(g.num_busy * tiles, [&](int64_t item) {
    const int64_t e = g.busy[item / tiles], n = item % tiles * rows_per_tile;
    const int64_t begin = g.offsets[e], count = g.offsets[e + 1] - begin;
    MoeTile t{};
    t.x = g.x;
    t.rows = g.rows + begin, t.num_rows = count;
    t.weight = {g.blocks.as<uint8_t>() + e * g.blocks.stride[0],
                g.scales.as<uint8_t>() + e * g.scales.stride[0],
                g.blocks.stride[1],
                g.scales.stride[1],
                g.packed,
                g.blocks.stride[2],
                g.scales.stride[2]};
    t.n_begin = n, t.n_end = std::min(n + rows_per_tile, g.num_rows);
    t.k = g.k;
    if (g.bias.dtype == DType::f32) t.bias_f32 = g.bias.as<float>() + e * g.num_rows;
    if (g.bias.dtype == DType::bf16) t.bias_bf16 = g.bias.as<bf16>() + e * g.num_rows;
    t.alpha = params.swiglu_alpha, t.limit = params.swiglu_limit;
    t.y = g.y + begin * g.y_stride, t.y_stride = g.y_stride;
    kernel(t);
  });
}

void run_combine(const Sizes& s, const int64_t* sorted_of, const float* down, const Tensor& topk_weights,
                 const Tensor& residual, const Tensor& y, const float** row_scratch) {
  const CombineKernel kernel = combine.pick();
  parallel_for(s.num_tokens, [&](int64_t t) {
    const float** rows = row_scratch + t * s.experts_per_token;
    for (int64_t c = 0; c < s.experts_per_token; ++c) {
      const int64_t at = sorted_of[t * s.experts_per_token + c];
      rows[c] = at < 0 ? nullptr : down + at * s.hidden_size;
    }
    kernel({residual ? residual.as<float>() + t * residual.stride[0] : nullptr, rows,
            topk_weights.as<float>() + t * s.experts_per_token, s.experts_per_token, y.as<float>() + t * y.stride[0],
            s.hidden_size});
  });
}

const MoeKernel& pick(Activations activations) {
  if (activations == Activations::f32) return *with_f32.pick();
  return activations == Activations::bf16 ? *with_bf16.pick() : *with_int8.pick();
}

}  // namespace

void mxfp4_moe(const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights, const MoeWeights& w,
               const MoeParams& params, const Tensor& residual, const Tensor& y) {
  const Sizes s = check(x, topk_ids, topk_weights, w, params, residual, y);
  if (s.num_tokens == 0) return;
  const MoeKernel& kernel = pick(params.activations);
  const int64_t pairs = s.num_pairs();
  const auto count = static_cast<size_t>(pairs);

  const size_t hidden = checked_product("expert outputs", {pairs, s.hidden_size});
  const size_t inner = checked_product("expert activations", {pairs, s.intermediate_size});
  Scratch scratch(prepared_bytes(s.num_tokens, s.hidden_size, kernel) +
                  prepared_bytes(pairs, s.intermediate_size, kernel) + Scratch::bytes<float>(inner) +
                  Scratch::bytes<float>(hidden) + 3 * Scratch::bytes<int64_t>(count) +
                  Scratch::bytes<int32_t>(count) + Scratch::bytes<const float*>(count) +
                  Scratch::bytes<int32_t>(static_cast<size_t>(s.num_experts) + 1) +
                  Scratch::bytes<int32_t>(static_cast<size_t>(s.num_experts)));
  const PreparedRows x_rows = take_prepared(scratch, s.num_tokens, s.hidden_size, kernel);
  const PreparedRows a_rows = take_prepared(scratch, pairs, s.intermediate_size, kernel);
  float* activated = scratch.take<float>(inner);
  float* down = scratch.take<float>(hidden);
  int64_t* token_of = scratch.take<int64_t>(count);   // by sorted pair
  int64_t* identity = scratch.take<int64_t>(count);   // by sorted pair
  int64_t* sorted_of = scratch.take<int64_t>(count);  // by pair; -1 when another holder has the expert
  int32_t* order = scratch.take<int32_t>(count);
  const float** row_scratch = scratch.take<const float*>(count);
  int32_t* offsets = scratch.take<int32_t>(static_cast<size_t>(s.num_experts) + 1);
  int32_t* busy = scratch.take<int32_t>(static_cast<size_t>(s.num_experts));

  sort_by_expert(topk_ids.as<int32_t>(), pairs, params.first_expert, s.num_experts, offsets, order);
  const int64_t held = offsets[s.num_experts];
  int64_t num_busy = 0;
  for (int64_t e = 0; e < s.num_experts; ++e) {
    if (offsets[e + 1] > offsets[e]) busy[num_busy++] = static_cast<int32_t>(e);
  }
  for (int64_t pair = 0; pair < pairs; ++pair) sorted_of[pair] = -1;
  for (int64_t i = 0; i < held; ++i) {
    token_of[i] = order[i] / s.experts_per_token;
    identity[i] = i;
    sorted_of[order[i]] = i;
  }
  const PrepareFn& prepare = s.packed ? kernel.prepare_for_packed : kernel.prepare;
  parallel_for(s.num_tokens, [&](int64_t t) {
    if (x.dtype == DType::f32) {
      prepare.f32(x.as<float>() + t * x.stride[0], s.hidden_size, x_rows, t);
    } else {
      prepare.b16(x.as<bf16>() + t * x.stride[0], s.hidden_size, x_rows, t);
    }
  });
  run_grouped({x_rows, token_of, offsets, busy, num_busy, w.gate_up_blocks, w.gate_up_scales, w.gate_up_bias,
               2 * s.intermediate_size, s.hidden_size, activated, s.intermediate_size, s.packed},
              params, kernel.gate_up);
  parallel_for(held,
               [&](int64_t i) { prepare.f32(activated + i * s.intermediate_size, s.intermediate_size, a_rows, i); });
  run_grouped({a_rows, identity, offsets, busy, num_busy, w.down_blocks, w.down_scales, w.down_bias, s.hidden_size,
               s.intermediate_size, down, s.hidden_size, s.packed},
              params, kernel.down);
  run_combine(s, sorted_of, down, topk_weights, residual, y, row_scratch);
}

}  // namespace mxmoe
