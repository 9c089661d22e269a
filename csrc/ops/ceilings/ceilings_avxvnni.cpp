#include "core/isa.h"
#if defined(MXMOE_AVX_VNNI_KERNELS)
#include "ops/ceilings/ceilings.h"

#include <immintrin.h>

#include "core/target_avxvnni.h"
namespace mxmoe {
namespace {

// Two or three instructions a cycle, five cycles each.
constexpr int kChains = 14;

float int8_rounds(int64_t rounds) {
  const __m256i weights = _mm256_set1_epi8(3), activations = _mm256_set1_epi8(5);
  __m256i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_dpbusd_avx_epi32(acc[i], weights, activations);
  }
  __m256i sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm256_xor_si256(sum, acc[i]);
  return static_cast<float>(_mm256_extract_epi32(sum, 0) ^ _mm256_extract_epi32(sum, 7));
}

// Bfloat16 as integers of 16 bits.
float int16_rounds(int64_t rounds) {
  const __m256i weights = _mm256_set1_epi16(3), activations = _mm256_set1_epi16(5);
  __m256i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_dpwssd_avx_epi32(acc[i], weights, activations);
  }
  __m256i sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm256_xor_si256(sum, acc[i]);
  return static_cast<float>(_mm256_extract_epi32(sum, 0) ^ _mm256_extract_epi32(sum, 7));
}

}  // namespace

const PeakKernel peak_int8_avxvnni = {2 * 32 * kChains, int8_rounds};
const PeakKernel peak_int16_avxvnni = {2 * 16 * kChains, int16_rounds};

}  // namespace mxmoe
#include "core/target_end.h"
#elif defined(MXMOE_X86_KERNELS)
#include "ops/ceilings/ceilings.h"

const mxmoe::PeakKernel mxmoe::peak_int8_avxvnni = {}, mxmoe::peak_int16_avxvnni = {};
#endif  // MXMOE_AVX_VNNI_KERNELS
