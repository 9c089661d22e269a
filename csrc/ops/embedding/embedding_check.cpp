#include "core/check.h"
#include "ops/embedding/embedding.h"

namespace mxmoe {

void check_embedding(const Tensor& token_ids, const Tensor& weight, const Tensor& y) {
  check_dtype("token_ids", token_ids, {DType::i64});
  check_dtype("weight", weight, {DType::f32, DType::bf16});
  check_dtype("out", y, {DType::f32});
  check_shape("token_ids", token_ids, {-1}, "(num_tokens,)");
  check_shape("weight", weight, {-1, -1}, "(vocab_size, hidden_size)");
  const int64_t num_tokens = token_ids.shape[0], hidden_size = weight.shape[1];
  check_shape("out", y, {num_tokens, hidden_size}, "(num_tokens, hidden_size)");
  check_no_overlap("out", y, {{"weight", weight}, {"token_ids", token_ids}});
}

}  // namespace mxmoe
