#if defined(MXMOE_X86_KERNELS)
#include "ops/ceilings/ceilings.h"

#include <immintrin.h>

#include "core/fetch.h"
#include "core/target_avx2.h"
namespace mxmoe {
namespace {

// Of sixteen registers ten hold chains and the rest what they are multiplied with and what comes of it. The int8
// chain of three instructions takes 7 cycles and two slots of the two multipliers: seven chains keep those busy.
constexpr int kChains = 10;

float int8_rounds(int64_t rounds) {
  const __m256i weights = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  __m256i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
    // The sum is its own next activation, or the product would be taken out of the loop.
    for (int i = 0; i < kChains; ++i) {
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(weights, acc[i]), ones));
    }
  }
  __m256i sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm256_xor_si256(sum, acc[i]);
  return static_cast<float>(_mm256_extract_epi32(sum, 0) ^ _mm256_extract_epi32(sum, 7));
}

// Bfloat16 as integers of 16 bits.
float int16_rounds(int64_t rounds) {
  const __m256i weights = _mm256_set1_epi16(3);
  __m256i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(weights, acc[i]));
  }
  __m256i sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm256_xor_si256(sum, acc[i]);
  return static_cast<float>(_mm256_extract_epi32(sum, 0) ^ _mm256_extract_epi32(sum, 7));
}

float float32_rounds(int64_t rounds) {
  const __m256 half = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1.0f);
  __m256 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_ps(static_cast<float>(i));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_fmadd_ps(acc[i], half, one);
  }
  __m256 sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm256_add_ps(sum, acc[i]);
  return _mm256_cvtss_f32(sum);
}

}  // namespace

uint64_t read_avx2(const char* p, int64_t n) {
  const FetchDistance distance = fetch_distance(4096);  // a page, so that the next one is already on its way
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int64_t at = 0; at < n; at += 128) {
    fetch_ahead(p + at, distance);
    fetch_ahead(p + at + 64, distance);
    for (int i = 0; i < 4; ++i) {
      sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + at + 32 * i)));
    }
  }
  const __m256i sum = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
  const __m128i half = _mm_xor_si128(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  uint64_t words[2];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), half);
  return words[0] ^ words[1];
}

// An instruction of 32 byte products and as many additions.
const PeakKernel peak_int8_avx2 = {2 * 32 * kChains, int8_rounds};
const PeakKernel peak_float32_avx2 = {2 * 8 * kChains, float32_rounds};
const PeakKernel peak_int16_avx2 = {2 * 16 * kChains, int16_rounds};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
