#include <cmath>

#include "core/check.h"
#include "core/packed.h"
#include "ops/mxfp4_moe/mxfp4_moe.h"

namespace mxmoe {
namespace {

// Blocks packed by panels have sixteen rows in the last axis.
bool is_packed(const Tensor& blocks) { return blocks.ndim == 4 && blocks.shape[3] == kPackedMxfp4Bytes; }

void check_matrix(const char* name, const Tensor& blocks, const Tensor& scales, const Tensor& bias, bool packed,
                  int64_t experts, int64_t rows, int64_t k, const Tensor& y) {
  const std::string prefix(name);
  const std::string blocks_name = prefix + "_blocks", scales_name = prefix + "_scales", bias_name = prefix + "_bias";
  check_dtype(blocks_name.c_str(), blocks, {DType::u8});
  check_dtype(scales_name.c_str(), scales, {DType::u8});
  check_dtype(bias_name.c_str(), bias, {DType::f32, DType::bf16});
  if (packed) {
    check_shape(blocks_name.c_str(), blocks, {experts, rows / kPanelRows, k / kMxBlock, kPackedMxfp4Bytes},
                "(experts, rows / 16, K / 32, 256)");
    check_shape(scales_name.c_str(), scales, {experts, rows / kPanelRows, k / kMxBlock, kPanelRows},
                "(experts, rows / 16, K / 32, 16)");
  } else {
    check_shape(blocks_name.c_str(), blocks, {experts, rows, k / kMxBlock, kMxBlockBytes},
                "(experts, rows, K / 32, 16)");
    check_shape(scales_name.c_str(), scales, {experts, rows, k / kMxBlock}, "(experts, rows, K / 32)");
  }
  check_shape(bias_name.c_str(), bias, {experts, rows}, "(experts, rows)");
  const std::pair<const std::string*, const Tensor*> all[] = {
      {&blocks_name, &blocks}, {&scales_name, &scales}, {&bias_name, &bias}};
  for (const auto& [what, tensor] : all) {
    if (!packed || tensor == &bias) check_contiguous(what->c_str(), *tensor);
    check_no_overlap("out", y, what->c_str(), *tensor);
  }
}

}  // namespace

void check_mxfp4_moe(const Tensor& x, const Tensor& ids, const Tensor& topk_weights, const MoeWeights& w,
                     const MoeParams& params, const Tensor& residual, const Tensor& y) {
  check_dtype("x", x, {DType::f32, DType::bf16});
  check_dtype("topk_ids", ids, {DType::i32});
  check_dtype("topk_weights", topk_weights, {DType::f32});
  check_dtype("out", y, {DType::f32});
  check_shape("x", x, {-1, -1}, "(num_tokens, hidden_size)");
  check_shape("topk_ids", ids, {x.shape[0], -1}, "(num_tokens, experts_per_token)");
  check_shape("topk_weights", topk_weights, {x.shape[0], ids.shape[1]}, "(num_tokens, experts_per_token)");
  check_contiguous("topk_ids", ids);
  check_contiguous("topk_weights", topk_weights);
  const bool packed = is_packed(w.gate_up_blocks);
  if (!packed) {
    check_shape("gate_up_blocks", w.gate_up_blocks, {-1, -1, -1, kMxBlockBytes},
                "(num_experts, 2 * intermediate_size, hidden_size / 32, 16)");
  }
  const int64_t gate_up_rows = w.gate_up_blocks.shape[1] * (packed ? kPanelRows : 1);
  const int64_t num_tokens = x.shape[0], hidden_size = x.shape[1], intermediate_size = gate_up_rows / 2;
  const int64_t num_experts = w.gate_up_blocks.shape[0], num_pairs = num_tokens * ids.shape[1];
  check_value(hidden_size >= kMxBlock && hidden_size % kMxBlock == 0, "x has hidden_size ", hidden_size,
              "; wanted a multiple of ", kMxBlock);
  check_value(num_experts >= 1, "gate_up_blocks holds no experts; wanted at least 1");
  check_value(gate_up_rows % (2 * kMxBlock) == 0 && intermediate_size > 0, "gate_up_blocks has ", gate_up_rows,
              " rows; wanted 2 * intermediate_size with intermediate_size a multiple of 32");
  check_matrix("gate_up", w.gate_up_blocks, w.gate_up_scales, w.gate_up_bias, packed, num_experts,
               2 * intermediate_size, hidden_size, y);
  check_matrix("down", w.down_blocks, w.down_scales, w.down_bias, packed, num_experts, hidden_size, intermediate_size,
               y);
  check_shape("out", y, {num_tokens, hidden_size}, "(num_tokens, hidden_size)");
  if (residual) {
    check_dtype("residual", residual, {DType::f32});
    check_shape("residual", residual, {num_tokens, hidden_size}, "(num_tokens, hidden_size)");
    const bool in_place = residual.data == y.data && residual.stride[0] == y.stride[0];
    if (!in_place) check_no_overlap("out", y, "residual", residual);
  }
  check_no_overlap("out", y, "x", x);
  check_no_overlap("out", y, "topk_ids", ids);
  check_no_overlap("out", y, "topk_weights", topk_weights);
  check_value(std::isfinite(params.swiglu_alpha), "swiglu_alpha is ", params.swiglu_alpha,
              "; wanted a finite number");
  check_value(params.swiglu_limit > 0.0f, "swiglu_limit is ", params.swiglu_limit, "; wanted a number above 0");
  check_value(params.first_expert >= 0, "first_expert is ", params.first_expert, "; wanted 0 or more");
  check_value(num_pairs <= INT32_MAX, "topk_ids holds ", num_pairs, " pairs; wanted at most ", INT32_MAX);
}

}  // namespace mxmoe
