// sink_attention over bfloat16 and int8 caches with vdpbf16ps and vpdpbusd. Four rows meet a step of 64 keys at once:
// both products are 4 x 64 tiles whose 16 sums stay in registers, one row's pair (or quad) of values broadcast
// against 64 lanes (keys in the scores, places in the head in the result). A sum sees its pairs in order whatever
// tile it stands in; sums of int8 are exact. The layouts that keys, values and weights are staged in and the products
// that read them are one thing, so the file is longer than most.
#if defined(MXMOE_X86_KERNELS)
#include "ops/sink_attention/sink_attention.h"

#include <cmath>

#include "simd/avx512x.h"

#include "core/target_avx512x.h"
namespace mxmoe {
namespace avx512x {
namespace {
#include "simd/math.inl"
#include "ops/sink_attention/sink_attention_rows.inl"

constexpr int kTile = 4;                           // rows of a tile
constexpr int kVectors = kAttentionKeys / kLanes;  // vectors of a tile's row
constexpr int64_t kPairsOfKeys = kAttentionKeys / 2;
static_assert(kAttentionRows % kTile == 0 && kVectors == 4, "tiles of 4 x 64");

// What is left to be asked for of the next step, a line of keys and one of values at a time all through this step: a
// burst would wait for memory itself.
struct Ahead {
  const char *k, *v;    // where the keys follow each other
  int64_t done, bytes;  // of each
  int64_t scattered;    // else keys asked for so far
  MXMOE_INLINE void some() {
    if (done >= bytes) return;
    prefetch(k + done);
    prefetch(v + done);
    done += 64;
  }
};

// All an item needs, on the stack of whichever thread runs it: 73 KB for head_dim 64, 270 KB for 256. A pair is two
// bfloat16 values in the order of their sum, a quad four int8.
template <int kDim>
struct AttentionState {
  alignas(64) bf16 q[kAttentionRows][kDim];
  alignas(64) uint32_t k[kDim / 2][kAttentionKeys];  // pairs along the head; with an int8 cache quads, raised by 128
  alignas(64) uint32_t v[kPairsOfKeys][kDim];        // pairs of keys, in the order that put_in_order takes back
  alignas(64) bf16 p[kTile][kAttentionKeys];
  alignas(64) float k_scale[kAttentionKeys], v_scale[kAttentionKeys];  // k_scale times sm_scale
  alignas(64) float lane_sums[kAttentionRows][kLanes];                 // the denominator, by lanes
  // With an int8 cache a query is q_scale * (128 * q_high + q_low), and its products begin at q_start, which takes
  // the keys' raise off again.
  alignas(64) int8_t q_high[kAttentionRows][kDim], q_low[kAttentionRows][kDim];
  float q_scale[kAttentionRows];
  int32_t q_start[kAttentionRows];
  RowSums<kDim> total, chunk;
  Slots slots[2];  // of this step and the next
  Ahead ahead;
  bool spreads_nan;  // a value is a NaN or an infinity, and not every row sees every key
};

inline __m512bh as_pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }
inline __m512bh load_pairs(const uint32_t* p) { return as_pairs(_mm512_load_si512(p)); }
inline __m512bh broadcast_pair(const bf16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return as_pairs(_mm512_set1_epi32(pair));
}
inline __m512i to_pairs(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

// 32 values of a cache row in bfloat16, those outside the mask zero. int8 is exact in it.
inline __m512i load_32(const bf16* p, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, p); }
inline __m512i load_32(const int8_t* p, __mmask32 mask) {
  const __m256i x = _mm256_maskz_loadu_epi8(mask, p);
  const __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(x));
  const __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1));
  return to_pairs(_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high));
}
inline __mmask32 first_32(int64_t n) { return n >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << n) - 1u); }
template <bool kRun, typename T>
inline __m512i load_slot(const T* from, int64_t slot, int64_t at, __mmask32 mask) {
  return !kRun && slot < 0 ? _mm512_setzero_si512() : load_32(from + at, mask);
}

// 64 bytes of a key: 32 bfloat16 values, or 64 of int8 raised by 128 to be unsigned.
inline __m512i load_key(const bf16* p, int64_t n) { return load_32(p, first_32(n)); }
inline __m512i load_key(const int8_t* p, int64_t n) {
  const __mmask64 mask = n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
  return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, p), _mm512_set1_epi8(-128));
}

inline void look_ahead(const AttentionItem& t, const Slots& next, int64_t row_bytes, Ahead& ahead) {
  ahead = {nullptr, nullptr, 0, 0, 0};
  if (!next.run) return;
  ahead.k = static_cast<const char*>(t.k) + next.k[0] * row_bytes;
  ahead.v = static_cast<const char*>(t.v) + next.v[0] * row_bytes;
  ahead.bytes = kAttentionKeys * row_bytes;
  if (t.k_scales == nullptr) return;
  for (int64_t j = 0; j < kAttentionKeys; j += kLanes) {
    prefetch(t.k_scales + next.k[j]);
    prefetch(t.v_scales + next.k[j]);
  }
}

// Keys that do not follow each other, up to number `until`.
inline void ask(const AttentionItem& t, const Slots& next, int64_t until, int64_t row_bytes, Ahead& ahead) {
  if (next.run) return;
  for (; ahead.scattered < until; ++ahead.scattered) prefetch_slot(t, next, ahead.scattered, row_bytes);
}

inline int64_t num_tiles(const AttentionItem& t) { return (num_rows(t) + kTile - 1) / kTile; }

// With kRun the step's keys follow each other, and head_dim is kDim.
template <typename T, bool kRun, int kDim>
inline void stage_keys(const AttentionItem& t, const Slots& slots, AttentionState<kDim>& s) {
  constexpr int64_t kPerLane = 4 / sizeof(T);  // values of one lane
  const T* keys = static_cast<const T*>(t.k);
  const int64_t head_dim = kRun ? kDim : t.head_dim;
  for (int64_t j = 0; j < kAttentionKeys; j += kLanes) {
    for (int64_t d = 0; d < head_dim; d += kLanes * kPerLane) {
      f32v rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t slot = kRun ? slots.k[0] + j + i : slots.k[j + i];
        const bool none = !kRun && slot < 0;
        const __m512i key = none ? _mm512_setzero_si512() : load_key(keys + slot * head_dim + d, head_dim - d);
        rows[i].v = _mm512_castsi512_ps(key);
      }
      for (int i = 0; i < 4; ++i) s.ahead.some();
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) _mm512_store_ps(&s.k[d / kPerLane + i][j], rows[i].v);
    }
  }
}

template <typename T, bool kRun, int kDim>
inline void stage_values(const AttentionItem& t, const Slots& slots, AttentionState<kDim>& s) {
  const T* values = static_cast<const T*>(t.v);
  const int64_t head_dim = kRun ? kDim : t.head_dim;
  for (int64_t j = 0; j < kPairsOfKeys; ++j) {
    s.ahead.some();
    const int64_t slot0 = kRun ? slots.v[0] + 2 * j : slots.v[2 * j];
    const int64_t slot1 = kRun ? slots.v[0] + 2 * j + 1 : slots.v[2 * j + 1];
    for (int64_t d = 0; d < kDim && d < (head_dim + 63) / 64 * 64; d += 32) {
      const __mmask32 mask = first_32(greater(head_dim - d, 0));
      const __m512i v0 = load_slot<kRun>(values, slot0, slot0 * head_dim + d, mask);
      const __m512i v1 = load_slot<kRun>(values, slot1, slot1 * head_dim + d, mask);
      _mm512_store_si512(&s.v[j][d], _mm512_unpacklo_epi16(v0, v1));
      _mm512_store_si512(&s.v[j][d + kLanes], _mm512_unpackhi_epi16(v0, v1));
    }
  }
}

template <int kDim>
inline void stage_scales(const AttentionItem& t, const Slots& slots, AttentionState<kDim>& s) {
  if (slots.run) {
    const __m512 sm_scale = _mm512_set1_ps(t.sm_scale);
    for (int64_t j = 0; j < kAttentionKeys; j += kLanes) {
      _mm512_store_ps(s.k_scale + j, _mm512_mul_ps(_mm512_loadu_ps(t.k_scales + slots.k[0] + j), sm_scale));
      _mm512_store_ps(s.v_scale + j, _mm512_loadu_ps(t.v_scales + slots.k[0] + j));
    }
    return;
  }
  for (int64_t j = 0; j < kAttentionKeys; ++j) {
    const int64_t slot = slots.k[j];
    s.k_scale[j] = slot < 0 ? 0.0f : t.k_scales[slot] * t.sm_scale;
    s.v_scale[j] = slot < 0 ? 0.0f : t.v_scales[slot];
  }
}

template <typename T, int kDim>
inline void stage(const AttentionItem& t, const Slots& slots, const Slots& next, AttentionState<kDim>& s) {
  look_ahead(t, next, t.head_dim * static_cast<int64_t>(sizeof(T)), s.ahead);
  if (slots.run && t.head_dim == kDim) {
    stage_keys<T, true>(t, slots, s);
    stage_values<T, true>(t, slots, s);
  } else {
    stage_keys<T, false>(t, slots, s);
    stage_values<T, false>(t, slots, s);
  }
  if (sizeof(T) == 1) stage_scales(t, slots, s);
}

// Places of the head that staged values fill, in their order.
inline int64_t staged_dim(const AttentionItem& t) { return (t.head_dim + 31) / 32 * 32; }

template <int kDim>
inline bool all_finite(const AttentionItem& t, const AttentionState<kDim>& s) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 found = 0;
  for (int64_t j = 0; j < kPairsOfKeys; ++j) {
    for (int64_t d = 0; d < staged_dim(t); d += kLanes) {
      const __m512i pairs = _mm512_load_si512(&s.v[j][d]);
      found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
    }
  }
  return found == 0;
}

// 2^y for y <= 0, good to 3e-6 of itself and exact at 0: a minimax polynomial over [-1/2, 1/2], as the result is
// rounded to bfloat16. Below -200 it is 0; NaN stays NaN.
inline __m512 exp2_below_0(__m512 y) {
  y = _mm512_max_ps(_mm512_set1_ps(-200.0f), y);
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(y, n);
  __m512 p = _mm512_set1_ps(0.0095828529f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0559064249f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2402409862f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931241934f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}
inline __m512 exp_of_difference(__m512 x, __m512 top) {
  return exp2_below_0(_mm512_mul_ps(_mm512_sub_ps(x, top), _mm512_set1_ps(1.44269504f)));
}

// Which of the 64 keys of a step a row sees.
inline uint64_t visible_keys(const AttentionItem& t, int64_t row, int64_t base) {
  const int64_t from = greater(first_key(t, row) - base, 0), to = lesser(last_key(t, row) - base, 63);
  return to < from ? 0 : (~uint64_t{0} << from) & (~uint64_t{0} >> (63 - to));
}
inline __mmask16 lanes_of(uint64_t visible, int vector) {
  return static_cast<__mmask16>(visible >> (vector * kLanes));
}

// The largest of four rows' 16 lanes each, as [row 0, row 1, row 2, row 3] four times over.
inline __m512 max_by_rows(const __m512 (&x)[kTile]) {
  const __m512 x01 = _mm512_max_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 x23 = _mm512_max_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  __m512 top = _mm512_max_ps(_mm512_shuffle_ps(x01, x23, 0x44), _mm512_shuffle_ps(x01, x23, 0xee));
  top = _mm512_max_ps(top, _mm512_shuffle_f32x4(top, top, 0x4e));
  return _mm512_max_ps(top, _mm512_shuffle_f32x4(top, top, 0xb1));
}

// acc[r][n] += sum of pairs a[r][i] . b[i][16 n, 16 n + 16) over i.
template <int64_t kStride, int64_t kStrideA>
inline void multiply_tile(const bf16* a, const uint32_t* b, int64_t num_pairs, Ahead& ahead,
                          __m512 (&acc)[kTile][kVectors]) {
  for (int64_t i = 0; i < num_pairs; ++i) {
    ahead.some();
    __m512bh lanes[kVectors];
    for (int n = 0; n < kVectors; ++n) lanes[n] = load_pairs(b + i * kStride + n * kLanes);
    for (int r = 0; r < kTile; ++r) {
      const __m512bh pair = broadcast_pair(a + r * kStrideA + 2 * i);
      for (int n = 0; n < kVectors; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], pair, lanes[n]);
    }
  }
}

// vpdpbusd. Around the intrinsic GCC copies every accumulator of the loop below, and spills some.
inline __m512i dot_quads(__m512i acc, __m512i raised, __m512i quad) {
#if defined(__GNUC__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(raised), "v"(quad));
  return acc;
#else
  return _mm512_dpbusd_epi32(acc, raised, quad);
#endif
}

// acc[r][n] += sum of quads q[r][i] . k[i][16 n, 16 n + 16) over i.
template <int64_t kStrideQ>
inline void add_quads(const int8_t* q, const uint32_t* k, int64_t num_quads, Ahead& ahead,
                      __m512i (&acc)[kTile][kVectors]) {
  for (int64_t i = 0; i < num_quads; ++i) {
    ahead.some();
    __m512i lanes[kVectors];
    for (int n = 0; n < kVectors; ++n) lanes[n] = _mm512_load_si512(k + i * kAttentionKeys + n * kLanes);
    for (int r = 0; r < kTile; ++r) {
      int32_t quad;
      std::memcpy(&quad, q + r * kStrideQ + 4 * i, sizeof quad);
      for (int n = 0; n < kVectors; ++n) acc[r][n] = dot_quads(acc[r][n], lanes[n], _mm512_set1_epi32(quad));
    }
  }
}

// Scores of four rows against the quads of an int8 cache, but for the keys' scales: first the high parts of the
// queries, moved up by 7 bits, then the low ones on top. Products and sums are exact.
template <int kDim>
inline void score_quads(AttentionState<kDim>& s, int64_t row, int64_t num_quads, __m512 (&x)[kTile][kVectors]) {
  __m512i acc[kTile][kVectors];
  for (auto& of_row : acc) {
    for (__m512i& sum : of_row) sum = _mm512_setzero_si512();
  }
  add_quads<kDim>(s.q_high[row], s.k[0], num_quads, s.ahead, acc);
  for (auto& of_row : acc) {
    for (__m512i& sum : of_row) sum = _mm512_slli_epi32(sum, 7);
  }
  add_quads<kDim>(s.q_low[row], s.k[0], num_quads, s.ahead, acc);
  for (int r = 0; r < kTile; ++r) {
    const __m512i start = _mm512_set1_epi32(s.q_start[row + r]);
    const __m512 scale = _mm512_set1_ps(s.q_scale[row + r]);
    for (int n = 0; n < kVectors; ++n) {
      x[r][n] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(acc[r][n], start)), scale);
    }
  }
}

// Weights of one row against its maximum: into p as they multiply values, and into the row's lanes of the
// denominator.
template <bool kMasked, bool kScaled, int kDim>
inline void weights_of_row(AttentionState<kDim>& s, int r, __m512 (&x)[kVectors], __m512 top, __m512 rescale,
                           uint64_t visible, float* lane_sums) {
  __m512 sum = _mm512_mul_ps(_mm512_load_ps(lane_sums), rescale);
  for (int n = 0; n < kVectors; ++n) {
    x[n] = exp_of_difference(x[n], top);
    if (!kScaled) continue;
    sum = _mm512_add_ps(sum, x[n]);
    // A NaN for a scale must not pass through a weight of 0.
    const __mmask16 mask = kMasked ? lanes_of(visible, n) : ~__mmask16{0};
    x[n] = _mm512_maskz_mul_ps(mask, x[n], _mm512_load_ps(s.v_scale + n * kLanes));
  }
  for (int n = 0; n < kVectors; n += 2) {
    const __m512i pairs = to_pairs(x[n], x[n + 1]);
    _mm512_store_si512(&s.p[r][n * kLanes], pairs);
    if (!kScaled) sum = _mm512_dpbf16_ps(sum, as_pairs(pairs), as_pairs(_mm512_set1_epi32(0x3f803f80)));  // times 1
  }
  _mm512_store_ps(lane_sums, sum);
}

// Scores of rows [row, row + 4) on a step, their running maximum, and the weights against it. Returns by what the
// rows' earlier sums are to be multiplied, as max_by_rows orders rows.
template <bool kMasked, bool kScaled, int kDim>
inline __m512 weigh(const AttentionItem& t, AttentionState<kDim>& s, int64_t row, const uint64_t (&visible)[kTile]) {
  __m512 x[kTile][kVectors], largest[kTile];
  if (kScaled) {
    score_quads(s, row, (t.head_dim + 3) / 4, x);
  } else {
    for (auto& of_row : x) {
      for (__m512& sum : of_row) sum = _mm512_setzero_ps();
    }
    multiply_tile<kAttentionKeys, kDim>(s.q[row], s.k[0], (t.head_dim + 1) / 2, s.ahead, x);
  }
  const __m512 masked = _mm512_set1_ps(float_from_bits(0xff800000u));  // -infinity
  for (int r = 0; r < kTile; ++r) {
    largest[r] = masked;
    for (int n = 0; n < kVectors; ++n) {
      const __m512 scale = kScaled ? _mm512_load_ps(s.k_scale + n * kLanes) : _mm512_set1_ps(t.sm_scale);
      x[r][n] = _mm512_mul_ps(x[r][n], scale);
      if (kMasked) x[r][n] = _mm512_mask_mov_ps(masked, lanes_of(visible[r], n), x[r][n]);
      largest[r] = _mm512_max_ps(x[r][n], largest[r]);  // a NaN is passed over: the second operand wins
    }
  }
  const __m512 before = _mm512_broadcast_f32x4(_mm_loadu_ps(&s.chunk.m[row]));
  const __m512 top = _mm512_max_ps(before, max_by_rows(largest));
  _mm_storeu_ps(&s.chunk.m[row], _mm512_castps512_ps128(top));
  const __m512 rescale = exp_of_difference(before, top);
  for (int r = 0; r < kTile; ++r) {
    const __m512i lane = _mm512_set1_epi32(r);
    weights_of_row<kMasked, kScaled>(s, r, x[r], _mm512_permutexvar_ps(lane, top),
                                     _mm512_permutexvar_ps(lane, rescale), visible[r], s.lane_sums[row + r]);
  }
  return rescale;
}

// acc = acc * rescale + weights . values for rows [row, row + 4).
template <int kDim>
inline void add_values(const AttentionItem& t, AttentionState<kDim>& s, int64_t row, __m512 rescale) {
  for (int64_t d = 0; d < t.head_dim; d += kVectors * kLanes) {
    __m512 acc[kTile][kVectors];
    for (int r = 0; r < kTile; ++r) {
      const __m512 factor = _mm512_permutexvar_ps(_mm512_set1_epi32(r), rescale);
      for (int n = 0; n < kVectors; ++n) {
        acc[r][n] = _mm512_mul_ps(_mm512_loadu_ps(&s.chunk.acc[row + r][d + n * kLanes]), factor);
      }
    }
    multiply_tile<kDim, kAttentionKeys>(s.p[0], &s.v[0][d], kPairsOfKeys, s.ahead, acc);
    for (int r = 0; r < kTile; ++r) {
      for (int n = 0; n < kVectors; ++n) _mm512_storeu_ps(&s.chunk.acc[row + r][d + n * kLanes], acc[r][n]);
    }
  }
}

// The same where a value that some row does not see is a NaN or an infinity, which 0 times it would spread: every row
// takes zeros for the values it does not see. The same sums in the same order.
template <int kDim>
inline void add_seen_values(const AttentionItem& t, AttentionState<kDim>& s, int64_t row, __m512 rescale,
                            const uint64_t (&visible)[kTile]) {
  for (int r = 0; r < kTile; ++r) {
    const __m512 factor = _mm512_permutexvar_ps(_mm512_set1_epi32(r), rescale);
    for (int64_t d = 0; d < staged_dim(t); d += kLanes) {
      float* to = &s.chunk.acc[row + r][d];
      __m512 acc = _mm512_mul_ps(_mm512_loadu_ps(to), factor);
      for (int64_t i = 0; i < kPairsOfKeys; ++i) {
        const auto seen = static_cast<int>(visible[r] >> (2 * i)) & 3;
        const int mask = (seen & 1 ? 0x0000ffff : 0) | (seen & 2 ? ~0xffff : 0);
        const __m512i pairs = _mm512_and_si512(_mm512_load_si512(&s.v[i][d]), _mm512_set1_epi32(mask));
        acc = _mm512_dpbf16_ps(acc, broadcast_pair(&s.p[r][2 * i]), as_pairs(pairs));
      }
      _mm512_storeu_ps(to, acc);
    }
  }
}

template <typename T, int kDim>
inline void attend_step(const AttentionItem& t, const Slots& next, AttentionState<kDim>& s, int64_t base) {
  constexpr bool kScaled = sizeof(T) == 1;
  const int64_t row_bytes = t.head_dim * static_cast<int64_t>(sizeof(T));
  for (int64_t row = 0; row < num_rows(t); row += kTile) {
    ask(t, next, kAttentionKeys * (row / kTile + 1) / num_tiles(t), row_bytes, s.ahead);
    uint64_t visible[kTile], any = 0, all = ~uint64_t{0};
    for (int r = 0; r < kTile; ++r) {
      visible[r] = row + r < num_rows(t) ? visible_keys(t, row + r, base) : visible[r - 1];
      any |= visible[r], all &= visible[r];
    }
    if (any == 0) continue;
    const __m512 rescale =
        all == ~uint64_t{0} ? weigh<false, kScaled>(t, s, row, visible) : weigh<true, kScaled>(t, s, row, visible);
    if (s.spreads_nan) {
      add_seen_values(t, s, row, rescale, visible);
    } else {
      add_values(t, s, row, rescale);
    }
  }
}

// Pairs of keys are made within the quarters of a vector, so that of 32 places in the head every other four come
// first. Sums of a chunk keep that order to its end.
template <int kDim>
inline void put_in_order(AttentionState<kDim>& s, int64_t row) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t d = 0; d < kDim; d += 2 * kLanes) {
    float* acc = &s.chunk.acc[row][d];
    const __m512 first = _mm512_loadu_ps(acc), second = _mm512_loadu_ps(acc + kLanes);
    _mm512_storeu_ps(acc, _mm512_permutex2var_ps(first, low, second));
    _mm512_storeu_ps(acc + kLanes, _mm512_permutex2var_ps(first, high, second));
  }
}

template <typename T, int kDim>
inline void attend_chunk(const AttentionItem& t, AttentionState<kDim>& s, int64_t chunk) {
  for (int64_t row = 0; row < num_tiles(t) * kTile; ++row) {
    s.chunk.m[row] = kLowest;
    store(s.lane_sums[row], zero());
    for (int64_t d = 0; d < kDim; d += kLanes) store(&s.chunk.acc[row][d], zero());
  }
  const int64_t begin = greater(first_key(t, 0), chunk * kAttentionChunk);
  const int64_t end = lesser(last_key(t, num_rows(t) - 1) + 1, (chunk + 1) * kAttentionChunk);
  int64_t base = begin / kAttentionKeys * kAttentionKeys;
  // Whoever works on a chunk usually goes on to the next, so its first step is asked for, too.
  const int64_t visible_end = last_key(t, num_rows(t) - 1) + 1;
  locate(t, base, begin, end, s.slots[0]);
  for (int now = 0; base < end; base += kAttentionKeys, now ^= 1) {
    Slots& next = s.slots[now ^ 1];
    locate(t, base + kAttentionKeys, begin, visible_end, next);
    stage<T>(t, s.slots[now], next, s);
    const bool seen_by_all = first_key(t, num_rows(t) - 1) <= base && last_key(t, 0) >= base + kAttentionKeys - 1;
    s.spreads_nan = !seen_by_all && !all_finite(t, s);
    attend_step<T>(t, next, s, base);
  }
  for (int64_t row = 0; row < num_rows(t); ++row) {
    s.chunk.l[row] = reduce_add(load(s.lane_sums[row]));
    put_in_order(s, row);
  }
}

// Up to 16 values of a query, none of a row past the last.
inline f32v load_query(const AttentionItem& t, int64_t row, int64_t d) {
  const int64_t at = row / t.num_heads * t.q_token_stride + row % t.num_heads * t.head_dim + d;
  const int64_t count = row < num_rows(t) ? lesser(t.head_dim - d, kLanes) : 0;
  if (count <= 0) return zero();
  return t.q_dtype == DType::f32 ? load_n(static_cast<const float*>(t.q) + at, static_cast<int>(count))
                                 : load_n(static_cast<const bf16*>(t.q) + at, static_cast<int>(count));
}

template <int kDim>
inline void quantize_query(const AttentionItem& t, AttentionState<kDim>& s, int64_t row) {
  f32v largest = zero(), poison = zero();
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    const f32v q = load_query(t, row, d);
    largest = max(abs(q), largest);
    poison = fma(q, zero(), poison);  // NaN once a value is not finite
  }
  const QueryScale scale = query_scale(reduce_max(largest), reduce_add(poison));
  s.q_scale[row] = scale.scale;
  __m512i sum = _mm512_setzero_si512();
  for (int64_t d = 0; d < kDim; d += kLanes) {
    const f32v q = scale.inverse == 0.0f ? zero() : mul(load_query(t, row, d), set1(scale.inverse));
    const __m512i code = _mm512_cvtps_epi32(q.v);  // rounds to nearest, ties to even
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(64)), 7);
    const __m512i low = _mm512_sub_epi32(code, _mm512_slli_epi32(high, 7));
    _mm_store_si128(reinterpret_cast<__m128i*>(&s.q_high[row][d]), _mm512_cvtepi32_epi8(high));
    _mm_store_si128(reinterpret_cast<__m128i*>(&s.q_low[row][d]), _mm512_cvtepi32_epi8(low));
    sum = _mm512_add_epi32(sum, code);
  }
  s.q_start[row] = -128 * _mm512_reduce_add_epi32(sum);
}

// Rows past the last are zero: they fill up the last tile and are never stored.
template <int kDim>
inline void load_rows(const AttentionItem& t, AttentionState<kDim>& s) {
  for (int64_t row = 0; row < num_tiles(t) * kTile; ++row) {
    if (t.kv_dtype == DType::i8) {
      quantize_query(t, s, row);
      continue;
    }
    for (int64_t d = 0; d < kDim; d += kLanes) store(&s.q[row][d], load_query(t, row, d));
  }
}

template <int kDim>
inline void attention_of(const AttentionItem& t) {
  AttentionState<kDim> s;
  load_rows(t, s);
  begin_at_sinks(t, s.total);
  for (int64_t chunk = t.begin_chunk; chunk < t.end_chunk; ++chunk) {
    t.kv_dtype == DType::bf16 ? attend_chunk<bf16>(t, s, chunk) : attend_chunk<int8_t>(t, s, chunk);
    finish_chunk(t, chunk, s.chunk, s.total);
  }
  if (t.partial == nullptr) store_rows(t, s.total);
}

inline void attention_item(const AttentionItem& t) {
  if (t.head_dim <= 64) return attention_of<64>(t);
  if (t.head_dim <= 128) return attention_of<128>(t);
  attention_of<kMaxHeadDim>(t);
}
}  // namespace
}  // namespace avx512x

const AttentionKernel sink_attention_bf16_avx512x = {avx512x::attention_item, avx512x::merge_chunks};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
