// sampling
// Computes: greedy_sample: token_ids[t] = the index of the largest logit, the lowest among equals; a NaN counts as
//           the largest. logprobs[t] = logits[t, token] - log(sum_v exp(logits[t, v])), NaN where a logit is NaN or
//           the largest is infinite, by which the host sees a broken model.
//           sample: a token drawn as mxmoe.sampling's Sampler does, with a given number in place of its generator's:
//           of the logits over the temperature, those no more than 50 below the largest; cut to the top_k likeliest
//           (0: all), to the fewest that reach probability top_p, to those of at least min_p times the likeliest's
//           probability; then the first, from the likeliest down, at which the probability passes the number.
//           Temperature 0 is greedy_sample. logprobs are of the token before temperature and cuts.
// Shapes:   logits (num_tokens, vocab_size); token_ids, logprobs, temperature, top_p, min_p, top_k, positions
//           (num_tokens); uniforms (2, num_tokens), of which the row is taken that the position's parity names.
// Dtypes:   logits, logprobs float32; token_ids, top_k, positions int64; the rest float64. Of a probability 22 bits
//           are kept, in whole numbers whose sums are exact; so a choice is the host's but for a chance of some 1e-7.
// Layout:   contiguous; logits may have a row stride.
// Requires: 1 <= vocab_size < 2^31; temperature >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, 0 <= uniforms < 1.
// Calls:    no overlap; no scratch but what its blocks leave for the last of each row.
// CUDA:     alone: on a CPU, mxmoe.sampling does it. The vocabulary is cut at places that depend on its size alone,
//           so that a row's bits depend on that row alone.
// Source:   model card section 2.
#pragma once

#include "core/types.h"

namespace mxmoe {
namespace cuda {

class Stream;
// Of the results: rows of (2, num_tokens), by whether the token's position is even, so that a step's may still be
// read while the next one runs. `positions` (num_tokens) int64; all empty: no copies.
struct SampleCopies {
  Tensor positions, token_ids, logprobs;
};
void greedy_sample(Stream& stream, const Tensor& logits, const Tensor& token_ids, const Tensor& logprobs,
                   const SampleCopies& copies);

struct SampleParams {
  Tensor temperature, top_p, min_p, top_k, uniforms, positions;
};
void sample(Stream& stream, const Tensor& logits, const SampleParams& params, const Tensor& token_ids,
            const Tensor& logprobs, const SampleCopies& copies);

}  // namespace cuda
}  // namespace mxmoe
