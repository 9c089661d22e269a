#if defined(MXMOE_X86_KERNELS)
#include "ops/ceilings/ceilings.h"

#include <immintrin.h>

#include "core/fetch.h"
#include "core/target_avx512.h"
namespace mxmoe {
namespace {

constexpr int kChains = 16;  // as for AVX2, with registers to spare

float int8_rounds(int64_t rounds) {
  const __m512i weights = _mm512_set1_epi8(3), ones = _mm512_set1_epi16(1);
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
    // The sum is its own next activation, or the product would be taken out of the loop.
    for (int i = 0; i < kChains; ++i) {
      acc[i] = _mm512_add_epi32(acc[i], _mm512_madd_epi16(_mm512_maddubs_epi16(weights, acc[i]), ones));
    }
  }
  __m512i sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_xor_si512(sum, acc[i]);
  return static_cast<float>(_mm512_reduce_add_epi32(sum));
}

// Bfloat16 as integers of 16 bits.
float int16_rounds(int64_t rounds) {
  const __m512i weights = _mm512_set1_epi16(3);
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_add_epi32(acc[i], _mm512_madd_epi16(weights, acc[i]));
  }
  __m512i sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_xor_si512(sum, acc[i]);
  return static_cast<float>(_mm512_reduce_add_epi32(sum));
}

float float32_rounds(int64_t rounds) {
  const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_fmadd_ps(acc[i], half, one);
  }
  __m512 sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, acc[i]);
  return _mm512_reduce_add_ps(sum);
}

}  // namespace

uint64_t read_avx512(const char* p, int64_t n) {
  const FetchDistance distance = fetch_distance(4096);  // a page, so that the next one is already on its way
  __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t at = 0; at < n; at += 256) {
    for (int i = 0; i < 4; ++i) {
      fetch_ahead(p + at + 64 * i, distance);
      sums[i] = _mm512_xor_si512(sums[i], _mm512_loadu_si512(p + at + 64 * i));
    }
  }
  const __m512i sum = _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3]));
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum));
}

// An instruction of 64 byte products and as many additions.
const PeakKernel peak_int8_avx512 = {2 * 64 * kChains, int8_rounds};
const PeakKernel peak_float32_avx512 = {2 * 16 * kChains, float32_rounds};
const PeakKernel peak_int16_avx512 = {2 * 32 * kChains, int16_rounds};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
