// sampling
// Computes: greedy_sample: token_ids[t] = the index of the largest logit, the lowest among equals; a NaN counts as
//           the largest. logprobs[t] = logits[t, token] - log(sum_v exp(logits[t, v])), NaN where a logit is NaN or
//           the largest is infinite, by which the host sees a broken model.
// Shapes:   logits (num_tokens, vocab_size); token_ids, logprobs (num_tokens).
// Dtypes:   logits, logprobs float32; token_ids int64. float32 throughout.
// Layout:   contiguous; logits may have a row stride.
// Requires: 1 <= vocab_size < 2^31.
// Calls:    no overlap; no scratch but what its blocks leave for the last of each row.
// CUDA:     alone: on a CPU, mxmoe.sampling does it. The vocabulary is cut at places that depend on its size alone,
//           so that a row's bits depend on that row alone.
// Source:   model card section 2.
#pragma once

#include "core/types.h"

namespace mxmoe {
namespace cuda {

class Stream;
void greedy_sample(Stream& stream, const Tensor& logits, const Tensor& token_ids, const Tensor& logprobs);

}  // namespace cuda
}  // namespace mxmoe
