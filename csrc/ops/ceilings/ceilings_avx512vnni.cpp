#if defined(MXMOE_X86_KERNELS)
#include "ops/ceilings/ceilings.h"

#include <immintrin.h>

#include "core/target_avx512vnni.h"
namespace mxmoe {
namespace {

// Two instructions a cycle, five cycles each: ten chains would do.
constexpr int kChains = 16;

float int8_rounds(int64_t rounds) {
  const __m512i weights = _mm512_set1_epi8(3), activations = _mm512_set1_epi8(5);
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], weights, activations);
  }
  __m512i sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_xor_si512(sum, acc[i]);
  return static_cast<float>(_mm512_reduce_add_epi32(sum));
}

// Bfloat16 as integers of 16 bits.
float int16_rounds(int64_t rounds) {
  const __m512i weights = _mm512_set1_epi16(3), activations = _mm512_set1_epi16(5);
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpwssd_epi32(acc[i], weights, activations);
  }
  __m512i sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_xor_si512(sum, acc[i]);
  return static_cast<float>(_mm512_reduce_add_epi32(sum));
}

}  // namespace

const PeakKernel peak_int8_avx512vnni = {2 * 64 * kChains, int8_rounds};
const PeakKernel peak_int16_avx512vnni = {2 * 32 * kChains, int16_rounds};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
