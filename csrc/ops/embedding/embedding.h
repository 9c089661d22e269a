// embedding
// Computes: y[t] = weight[token_ids[t]].
// Shapes:   token_ids (num_tokens); weight (vocab_size, hidden_size); y (num_tokens, hidden_size).
// Dtypes:   token_ids int64; weight bfloat16 or float32; y float32.
// Layout:   weight's rows contiguous; y may have a row stride.
// Requires: 0 <= token_ids < vocab_size.
// Calls:    no overlap; one thread; no scratch.
// CUDA:     ids lie on the device and are not looked at beforehand: one out of range gives a row of NaN.
// Source:   model card section 2.
#pragma once

#include "core/types.h"

namespace mxmoe {

void check_embedding(const Tensor& token_ids, const Tensor& weight, const Tensor& y);
void embedding(const Tensor& token_ids, const Tensor& weight, const Tensor& y);

namespace cuda {
class Stream;
void embedding(Stream& stream, const Tensor& token_ids, const Tensor& weight, const Tensor& y);
}  // namespace cuda

}  // namespace mxmoe
