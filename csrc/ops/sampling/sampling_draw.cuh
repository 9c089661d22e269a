// Drawing a token from a row of logits: mxmoe.sampling's choice, without its sort. A token's probability, but for a
// factor, is a whole number, its mass; so sums do not depend on the order in which they are formed. What the host
// finds in a sorted row is found here as the first token, from the likeliest down, at which the sum passes a bound.
#pragma once

#include "ops/sampling/sampling_rows.cuh"

namespace mxmoe {
namespace cuda {
namespace sampling {

constexpr int kDrawThreads = 1024;
constexpr int kDrawWarps = kDrawThreads / kWarp;
constexpr int kBins = 2048;  // of 1/32 each below the largest logit over the temperature, the last one open
constexpr float kBinsPerNat = 32.0f;
constexpr int kRadix = 256;        // where a bin has too many tokens for a list
constexpr int kMassBits = 45;      // of the likeliest token's mass: 2^18 tokens stay below 2^63
constexpr double kLowest = -50.0;  // below, all tokens together vanish in float64's rounding: see mxmoe.sampling
constexpr double kLog2eDouble = 1.4426950408889634;

struct Draw {
  const float* logits;
  int64_t stride;
  int vocab_size, mass_bits;
  const double *temperature, *top_p, *min_p;  // of each token
  const int64_t* top_k;
  const double* uniforms;  // [2][token], by the position's parity
  const int64_t* positions;
  int64_t* token_ids;  // holds the likeliest, and its logprob
  float* logprobs;
  Copies copies;
};

struct DrawShared {
  unsigned long long sums[kBins];
  unsigned counts[kBins];
  unsigned long long keys[kDrawThreads], masses[kDrawThreads];
  unsigned long long total, before, found;  // found: a token's key
  unsigned listed, bin;
};

// One row: how its logits become masses, and which of them are still in the game.
struct Row {
  const float* logits;
  int vocab_size, mass_bits;
  double top, per_temperature;
  double lowest;            // of x below
  unsigned long long last;  // the least key that counts
  __device__ __forceinline__ double x_of(float logit) const {
    const double below = static_cast<double>(logit) - top;
    return below == 0.0 ? 0.0 : below * per_temperature;
  }
  __device__ __forceinline__ bool counts(double x, unsigned long long key) const {
    return x >= lowest && key >= last;
  }
  // e^x of the mass of the likeliest, to 22 bits.
  __device__ __forceinline__ unsigned long long mass_of(double x) const {
    const double y = x * kLog2eDouble, whole = floor(y);
    if (!(whole > -mass_bits)) return 0;
    const float fraction = ptx::exp2_approx(static_cast<float>(y - whole));
    const auto scaled = static_cast<unsigned long long>(fraction * 8388608.0f);  // 2^23
    const int shift = static_cast<int>(whole) + mass_bits - 23;
    return shift >= 0 ? scaled << shift : scaled >> -shift;
  }
  __device__ __forceinline__ unsigned bin_of(double x) const {
    return static_cast<unsigned>(fminf(static_cast<float>(-x) * kBinsPerNat, static_cast<float>(kBins - 1)));
  }
};

// Calls visit(key, mass or 1, x) for every token that counts.
template <bool kCount, typename Visit>
__device__ __forceinline__ void for_tokens(const Row& row, const Visit& visit) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < row.vocab_size; i += kDrawThreads) {
    const float logit = row.logits[i];
    const double x = row.x_of(logit);
    const unsigned long long key = order_key(logit, i);
    if (row.counts(x, key)) visit(key, kCount ? 1ull : row.mass_of(x), x);
  }
}

// By the first warp: the first bin at which the sum passes `bound`; s.bin, and what lies before it in s.before.
__device__ __forceinline__ void find_bin(DrawShared& s, int bins, unsigned long long bound) {
  const int lane = static_cast<int>(threadIdx.x), each = bins / kWarp;
  if (lane < kWarp) {
    unsigned long long own = 0;
    for (int i = 0; i < each; ++i) own += s.sums[lane * each + i];
    unsigned long long through = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned long long other = __shfl_up_sync(kAllLanes, through, step);
      if (lane >= step) through += other;
    }
    unsigned long long sum = through - own;
    if (sum <= bound && bound < through) {
      int i = lane * each;
      while (sum + s.sums[i] <= bound) sum += s.sums[i++];
      s.bin = static_cast<unsigned>(i), s.before = sum;
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void clear_bins(DrawShared& s) {
  __syncthreads();  // all have read what they were
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kDrawThreads) s.sums[i] = 0, s.counts[i] = 0;
  __syncthreads();
}

// The sum over all tokens that count.
template <bool kCount>
__device__ unsigned long long sum_of(const Row& row, DrawShared& s) {
  __syncthreads();
  if (threadIdx.x == 0) s.total = 0;
  __syncthreads();
  unsigned long long own = 0;
  for_tokens<kCount>(row, [&](unsigned long long, unsigned long long mass, double) { own += mass; });
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) own += __shfl_xor_sync(kAllLanes, own, step);
  if (threadIdx.x % kWarp == 0) atomicAdd(&s.total, own);
  __syncthreads();
  return s.total;
}

// The key of the first token, from the likeliest down, at which the sum passes `bound`, less than the sum of all. By
// bins of x; then by a list of the bin's tokens, or, for a bin of very many, by its keys' bytes.
template <bool kCount>
__device__ unsigned long long find(const Row& row, DrawShared& s, unsigned long long bound) {
  clear_bins(s);
  for_tokens<kCount>(row, [&](unsigned long long, unsigned long long mass, double x) {
    const unsigned bin = row.bin_of(x);
    atomicAdd(&s.sums[bin], mass);
    atomicAdd(&s.counts[bin], 1u);
  });
  __syncthreads();
  find_bin(s, kBins, bound);
  const unsigned bin = s.bin, count = s.counts[bin];
  unsigned long long before = s.before;
  if (count <= kDrawThreads) {
    if (threadIdx.x == 0) s.listed = 0;
    __syncthreads();
    for_tokens<kCount>(row, [&](unsigned long long key, unsigned long long mass, double x) {
      if (row.bin_of(x) != bin) return;
      const unsigned place = atomicAdd(&s.listed, 1u);
      s.keys[place] = key, s.masses[place] = mass;
    });
    __syncthreads();
    if (threadIdx.x < count) {
      const unsigned long long own = s.keys[threadIdx.x];
      for (unsigned i = 0; i < count; ++i) before += s.keys[i] > own ? s.masses[i] : 0;
      if (before <= bound && bound - before < s.masses[threadIdx.x]) s.found = own;
    }
    __syncthreads();
    return s.found;
  }
  unsigned long long prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    clear_bins(s);
    for_tokens<kCount>(row, [&](unsigned long long key, unsigned long long mass, double x) {
      if (row.bin_of(x) != bin || (shift < 56 && key >> (shift + 8) != prefix)) return;
      atomicAdd(&s.sums[kRadix - 1 - static_cast<int>(key >> shift & 0xffu)], mass);  // the largest first
    });
    __syncthreads();
    find_bin(s, kRadix, bound - before);
    prefix = prefix << 8 | (kRadix - 1 - s.bin), before += s.before;
  }
  return prefix;
}

// The least whole number that is not below share * total, at least 1.
__device__ __forceinline__ unsigned long long part_of(unsigned long long total, double share) {
  const auto part = static_cast<unsigned long long>(ceil(share * static_cast<double>(total)));
  return max(1ull, min(part, total));
}

// grid: a block a token. Its likeliest has been found already.
__global__ void __launch_bounds__(kDrawThreads) sample_sm80_kernel(Draw d) {
  auto& s = *reinterpret_cast<DrawShared*>(ptx::dynamic_shared());
  const int64_t token = blockIdx.x;
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  const int64_t best = d.token_ids[token];
  const float best_logprob = d.logprobs[token];
  const double temperature = d.temperature[token];
  Row row{d.logits + token * d.stride, d.vocab_size, d.mass_bits, 0.0, 0.0, kLowest, 0};
  if (temperature == 0.0 || isnan(best_logprob)) {
    if (threadIdx.x == 0) put_copy(d.copies, token, best, best_logprob);
    return;
  }
  row.top = row.logits[best], row.per_temperature = 1.0 / temperature;
  const int64_t top_k = d.top_k[token];
  if (top_k > 0 && static_cast<unsigned long long>(top_k) < sum_of<true>(row, s)) {
    row.last = find<true>(row, s, static_cast<unsigned long long>(top_k) - 1);
  }
  const double top_p = d.top_p[token];
  if (top_p < 1.0) row.last = find<false>(row, s, part_of(sum_of<false>(row, s), top_p) - 1);
  if (d.min_p[token] > 0.0) row.lowest = fmax(kLowest, log(d.min_p[token]));
  const unsigned long long total = sum_of<false>(row, s);
  const double uniform = d.uniforms[(d.positions[token] & 1) * gridDim.x + token];
  const auto bound = static_cast<unsigned long long>(uniform * static_cast<double>(total));
  const unsigned long long key = find<false>(row, s, min(bound, total - 1));
  if (threadIdx.x == 0) {
    const int64_t id = index_of(key);
    const float logprob = best_logprob + static_cast<float>(static_cast<double>(row.logits[id]) - row.top);
    d.token_ids[token] = id, d.logprobs[token] = logprob;
    put_copy(d.copies, token, id, logprob);
  }
}

}  // namespace sampling
}  // namespace cuda
}  // namespace mxmoe
