#if defined(MXMOE_X86_KERNELS)
#include "ops/ceilings/ceilings.h"

#include <immintrin.h>

#include "core/target_avx512x.h"
namespace mxmoe {
namespace {

// Two instructions a cycle, five cycles each: ten chains would do.
constexpr int kChains = 16;

float bf16_rounds(int64_t rounds) {
  const __m512bh weights = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(-0.5f));
  const __m512bh activations = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(0.25f));
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], weights, activations);
  }
  __m512 sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, acc[i]);
  return _mm512_reduce_add_ps(sum);
}

}  // namespace

const PeakKernel peak_bf16_avx512bf16 = {2 * 32 * kChains, bf16_rounds};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
