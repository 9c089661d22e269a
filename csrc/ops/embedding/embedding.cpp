#include "ops/embedding/embedding.h"

#include "core/check.h"

namespace mxmoe {

// A copy of a few rows: nothing here that an instruction set would speed up.
void embedding(const Tensor& token_ids, const Tensor& weight, const Tensor& y) {
  check_embedding(token_ids, weight, y);
  const int64_t num_tokens = token_ids.shape[0], vocab_size = weight.shape[0], hidden_size = weight.shape[1];
  const int64_t* ids = token_ids.as<int64_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    check_value(ids[t] >= 0 && ids[t] < vocab_size, "token_ids[", t, "] is ", ids[t], "; wanted 0 to ",
                vocab_size - 1);
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
    float* out = y.as<float>() + t * y.stride[0];
    if (weight.dtype == DType::f32) {
      std::memcpy(out, weight.as<float>() + ids[t] * weight.stride[0],
                  static_cast<size_t>(hidden_size) * sizeof(float));
    } else {
      const bf16* row = weight.as<bf16>() + ids[t] * weight.stride[0];
      for (int64_t i = 0; i < hidden_size; ++i) out[i] = to_float(row[i]);
    }
  }
}

}  // namespace mxmoe
