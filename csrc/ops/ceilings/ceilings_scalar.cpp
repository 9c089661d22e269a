#include <cstring>

#include "ops/ceilings/ceilings.h"

namespace mxmoe {
namespace {

// What the portable kernels do, which the compiler turns into whatever every machine has.
constexpr int kValues = 2048;

float int8_rounds(int64_t rounds) {
  int8_t a[kValues], b[kValues];
  for (int i = 0; i < kValues; ++i) a[i] = static_cast<int8_t>(i * 7), b[i] = static_cast<int8_t>(i * 13);
  int32_t sum = 0;
  for (int64_t r = 0; r < rounds; ++r) {
    a[r % kValues] = static_cast<int8_t>(sum);  // so that no round is like the last
    int32_t dot = 0;
    for (int i = 0; i < kValues; ++i) dot += static_cast<int32_t>(a[i]) * b[i];
    sum ^= dot;
  }
  return static_cast<float>(sum);
}

constexpr int kChains = 32;

float float32_rounds(int64_t rounds) {
  float acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = static_cast<float>(i);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * 0.5f + 1.0f;
  }
  float sum = 0.0f;
  for (float x : acc) sum += x;
  return sum;
}

}  // namespace

uint64_t read_scalar(const char* p, int64_t n) {
  uint64_t sums[8] = {};
  for (int64_t at = 0; at < n; at += 64) {
    uint64_t words[8];
    std::memcpy(words, p + at, sizeof words);
    for (int i = 0; i < 8; ++i) sums[i] ^= words[i];
  }
  uint64_t sum = 0;
  for (uint64_t word : sums) sum ^= word;
  return sum;
}

const PeakKernel peak_int8_scalar = {2 * kValues, int8_rounds};
const PeakKernel peak_float32_scalar = {2 * kChains, float32_rounds};

}  // namespace mxmoe
