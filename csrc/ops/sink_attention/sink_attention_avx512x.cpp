// sink_attention over bfloat16 and int8 caches with vdpbf16ps and vpdpbusd. Four rows meet a step of 64 keys at once:
// both products are 4 x 64 tiles whose 16 sums stay in registers, one row's pair (or quad) of values broadcast
// against 64 lanes (keys in the scores, places in the head in the result). Here is what the two caches share: the
// walk over steps and chunks, the staging of keys, the running maximum. Their products and weights stand in
// sink_attention_{bf16,int8}_avx512x.inl.
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

constexpr int kTile = 4;  // rows of a tile
// Rows whose scores are all there before their weights are made, so that one tile's maximum finds its way through
// lanes while another is at work.
constexpr int kTiles = 2;
constexpr int kTogether = kTiles * kTile;
constexpr int kVectors = kAttentionKeys / kLanes;  // vectors of a tile's row
static_assert(kAttentionRows % kTogether == 0 && kVectors == 4, "tiles of 4 x 64");

// What is left to be asked for of the next step, a line at a time all through this step: a burst would wait for
// memory itself. Keys before values; or, where the loops have no more turns than that takes, both at once.
struct Ahead {
  const char *keys, *values;
  int64_t done, end, turn;  // bytes: values are next from `turn` on
  bool both;
  int64_t scattered;  // keys that do not follow each other, so far
  MXMOE_INLINE void some() {
    if (done >= end) return;
    prefetch((done < turn ? keys : values - turn) + done);
    if (both) prefetch(values + done);
    done += 64;
  }
};

// All an item needs, on the stack of whichever thread runs it: 75 KB for head_dim 64, 270 KB for 256. A pair is two
// bfloat16 values in the order of their sum, a quad four int8.
template <int kDim>
struct AttentionState {
  alignas(64) bf16 q[kAttentionRows][kDim];
  alignas(64) uint32_t k[kDim / 2][kAttentionKeys];       // pairs along the head, or quads raised by 128
  alignas(64) uint32_t v[kAttentionKeys / 2][kDim];       // pairs or quads of keys, as put_in_order takes them back
  alignas(64) float x[kTogether][kAttentionKeys];         // scores, each row's in its own unit
  alignas(64) uint32_t p[kTogether][kAttentionKeys / 2];  // weights: pairs, or high quads and low ones
  alignas(64) float k_scale[kAttentionKeys], v_scale[kAttentionKeys];
  alignas(64) float lane_sums[kAttentionRows][kLanes];  // the denominator, by lanes
  // A score is its unit times what x and chunk.m hold of it. Powers of two are what exp2_below_0 wants it in.
  float unit[kAttentionRows], unit_of_2[kAttentionRows];
  // Of the rows that are together: the largest score of the step, and by what earlier sums are multiplied.
  alignas(16) float largest[kTogether], rescale[kTogether];
  // With an int8 cache a query is 128 * q_high + q_low of its unit, and its products begin at q_start, which takes
  // the keys' raise off again. Weights times their values' scales become codes by a row's code_scale; times p_unit
  // these are weights against the running maximum.
  alignas(64) int8_t q_high[kAttentionRows][kDim], q_low[kAttentionRows][kDim];
  int32_t q_start[kAttentionRows];
  alignas(16) float code_scale[kTogether], p_unit[kTogether];
  RowSums<kDim> total, chunk;
  Slots slots[2];  // of this step and the next
  Ahead ahead;
  bool spreads_nan;  // a value is a NaN or an infinity, and not every row sees every key
};

inline int64_t num_tiles(const AttentionItem& t) { return (num_rows(t) + kTile - 1) / kTile; }

template <int kDim>
inline void look_ahead(const AttentionItem& t, const Slots& next, int64_t row_bytes, AttentionState<kDim>& s) {
  s.ahead = {nullptr, nullptr, 0, 0, 0, false, 0};
  if (!next.run) return;
  const int64_t bytes = kAttentionKeys * row_bytes;
  const bool both = num_tiles(t) < 2 || t.kv_dtype == DType::bf16;
  s.ahead = {static_cast<const char*>(t.k) + next.k[0] * row_bytes,
             static_cast<const char*>(t.v) + next.v[0] * row_bytes,
             0,
             both ? bytes : 2 * bytes,
             bytes,
             both,
             0};
  if (t.k_scales == nullptr) return;
  for (int64_t j = 0; j < kAttentionKeys; j += kLanes) {
    prefetch(t.k_scales + next.k[0] + j);
    prefetch(t.v_scales + next.k[0] + j);
  }
}

// Keys that do not follow each other, up to number `until`.
inline void ask(const AttentionItem& t, const Slots& next, int64_t until, int64_t row_bytes, Ahead& ahead) {
  if (next.run) return;
  for (; ahead.scattered < until; ++ahead.scattered) prefetch_slot(t, next, ahead.scattered, row_bytes);
}

// 64 bytes of a row of a cache, of which n values exist; the others are zero.
inline __m512i load_64(const bf16* p, int64_t n) {
  const __mmask32 mask = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << greater(n, 0)) - 1;
  return _mm512_maskz_loadu_epi16(mask, p);
}
inline __m512i load_64(const int8_t* p, int64_t n) {
  const __mmask64 mask = n >= 64 ? ~__mmask64{0} : (__mmask64{1} << greater(n, 0)) - 1;
  return _mm512_maskz_loadu_epi8(mask, p);
}

// The same of a slot, from place d of the head on: zeros for none. With kRun all are there.
template <bool kRun, typename T>
inline __m512i load_slot(const T* from, int64_t slot, int64_t d, int64_t head_dim) {
  if (kRun) return _mm512_loadu_si512(from + slot * head_dim + d);
  return slot < 0 ? _mm512_setzero_si512() : load_64(from + slot * head_dim + d, head_dim - d);
}

// int8 keys become unsigned.
inline __m512i raise(__m512i key, const bf16*) { return key; }
inline __m512i raise(__m512i key, const int8_t*) { return _mm512_xor_si512(key, _mm512_set1_epi8(-128)); }

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
        const int64_t slot = kRun ? slots.k[0] + j + i : slots.key(j + i);
        rows[i].v = _mm512_castsi512_ps(raise(load_slot<kRun>(keys, slot, d, head_dim), keys));
      }
      for (int i = 0; i < 4; ++i) s.ahead.some();
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) _mm512_store_ps(&s.k[d / kPerLane + i][j], rows[i].v);
    }
  }
}

// 2^y for y <= 0, good to 3e-6 of itself and exact at 0: a minimax polynomial over [-1/2, 1/2]. Below -150 it is 0,
// also of -infinity, whose f is NaN: scalef makes 0 of that times 2^-infinity. NaN stays NaN. Of several vectors side
// by side: one after the other they would wait in the processor's queue, each for its own last operation.
template <int kCount>
inline void exp2_below_0(__m512 (&y)[kCount]) {
  const __m512 factor[5] = {_mm512_set1_ps(0.0095828529f), _mm512_set1_ps(0.0559064249f),
                            _mm512_set1_ps(0.2402409862f), _mm512_set1_ps(0.6931241934f), _mm512_set1_ps(1.0f)};
  __m512 n[kCount], p[kCount];
  for (int i = 0; i < kCount; ++i) n[i] = _mm512_roundscale_ps(y[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  for (int i = 0; i < kCount; ++i) y[i] = _mm512_sub_ps(y[i], n[i]), p[i] = factor[0];
  for (int j = 1; j < 5; ++j) {
    for (int i = 0; i < kCount; ++i) p[i] = _mm512_fmadd_ps(p[i], y[i], factor[j]);
  }
  for (int i = 0; i < kCount; ++i) y[i] = _mm512_scalef_ps(p[i], n[i]);
}

// exp of differences of scores, of which powers of two are `unit_of_2` each.
template <int kCount>
inline void weigh_scores(__m512 (&x)[kCount], __m512 top, __m512 unit_of_2) {
  for (__m512& score : x) score = _mm512_mul_ps(_mm512_sub_ps(score, top), unit_of_2);
  exp2_below_0(x);
}
inline __m512 weight_of(__m512 x, __m512 top, __m512 unit_of_2) {
  __m512 one[1] = {x};
  weigh_scores(one, top, unit_of_2);
  return one[0];
}

// Which of the 64 keys of a step a row sees.
inline uint64_t visible_keys(const AttentionItem& t, int64_t row, int64_t base) {
  const int64_t from = greater(first_key(t, row) - base, 0), to = lesser(last_key(t, row) - base, 63);
  return to < from ? 0 : (~uint64_t{0} << from) & (~uint64_t{0} >> (63 - to));
}
inline __mmask16 lanes_of(uint64_t visible, int vector) {
  return static_cast<__mmask16>(visible >> (vector * kLanes));
}

// What four rows have one of each, as [row 0, row 1, row 2, row 3] four times over.
inline __m512 load_rows_of(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
inline void store_rows_of(float* p, __m512 x) { _mm_storeu_ps(p, _mm512_castps512_ps128(x)); }
inline __m512 row_of(int r, __m512 x) { return _mm512_permutexvar_ps(_mm512_set1_epi32(r), x); }

struct ByValue {
  static __m512 max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};
// Positive floats have their order, and NaN and whatever is negative lie above.
struct ByBits {
  static __m512 max(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

// The largest of four rows' 16 lanes each.
template <typename Order>
inline __m512 max_by_rows(const __m512 (&x)[kTile]) {
  const __m512 x01 = Order::max(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 x23 = Order::max(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  __m512 top = Order::max(_mm512_shuffle_ps(x01, x23, 0x44), _mm512_shuffle_ps(x01, x23, 0xee));
  top = Order::max(top, _mm512_shuffle_f32x4(top, top, 0x4e));
  return Order::max(top, _mm512_shuffle_f32x4(top, top, 0xb1));
}

// Keeps a tile's scores as rows [at, at + 4) of those that are together, without what is not seen, and their largest.
template <bool kMasked, int kDim>
inline void keep_scores(AttentionState<kDim>& s, int at, __m512 (&x)[kTile][kVectors], const uint64_t* visible) {
  const __m512 unseen = _mm512_set1_ps(float_from_bits(0xff800000u));  // -infinity
  __m512 largest[kTile];
  for (int r = 0; r < kTile; ++r) {
    largest[r] = _mm512_set1_ps(kLowest);
    for (int n = 0; n < kVectors; ++n) {
      if (kMasked) x[r][n] = _mm512_mask_mov_ps(unseen, lanes_of(visible[r], n), x[r][n]);
      largest[r] = _mm512_max_ps(x[r][n], largest[r]);  // a NaN is passed over: the second operand wins
      _mm512_store_ps(&s.x[at + r][n * kLanes], x[r][n]);
    }
  }
  store_rows_of(&s.largest[at], max_by_rows<ByValue>(largest));
}

// Takes the largest scores into the running maximum of rows [row, row + 4), which is returned with by what their
// earlier sums are multiplied.
struct Tops {
  __m512 now, rescale;
};
template <int kDim>
inline Tops raise_tops(AttentionState<kDim>& s, int64_t row, int at) {
  const __m512 before = load_rows_of(&s.chunk.m[row]), unit = load_rows_of(&s.unit_of_2[row]);
  const __m512 now = _mm512_max_ps(before, load_rows_of(&s.largest[at]));
  const __m512 rescale = weight_of(before, now, unit);
  store_rows_of(&s.chunk.m[row], now);
  store_rows_of(&s.rescale[at], rescale);
  return {now, rescale};
}

// Up to 16 values of a query, none of a row past the last; of the other sign where sm_scale is negative.
inline f32v load_query(const AttentionItem& t, int64_t row, int64_t d) {
  const int64_t at = row / t.num_heads * t.q_token_stride + row % t.num_heads * t.head_dim + d;
  const int64_t count = row < num_rows(t) ? lesser(t.head_dim - d, kLanes) : 0;
  if (count <= 0) return zero();
  const f32v q = t.q_dtype == DType::f32 ? load_n(static_cast<const float*>(t.q) + at, static_cast<int>(count))
                                         : load_n(static_cast<const bf16*>(t.q) + at, static_cast<int>(count));
  return t.sm_scale < 0.0f ? sub(zero(), q) : q;
}

// Scores of a row are their unit, which is positive, times what its products give.
template <int kDim>
inline void set_unit(const AttentionItem& t, AttentionState<kDim>& s, int64_t row, float q_scale) {
  constexpr float kSmallest = 1e-37f;  // 0 times the -infinity of what is not seen would be no number
  const float unit = std::fabs(t.sm_scale) * q_scale;
  s.unit[row] = unit < kSmallest ? kSmallest : unit;
  s.unit_of_2[row] = s.unit[row] * 1.44269504f;
}

#include "ops/sink_attention/sink_attention_bf16_avx512x.inl"
#include "ops/sink_attention/sink_attention_int8_avx512x.inl"

template <typename Cache, int kDim>
inline void attend_step(const AttentionItem& t, const Slots& next, AttentionState<kDim>& s, int64_t base,
                        bool seen_by_all) {
  const int64_t row_bytes = t.head_dim * static_cast<int64_t>(sizeof(typename Cache::Value));
  for (int64_t row = 0; row < num_rows(t); row += kTogether) {
    const int64_t rows_done = lesser(row + kTogether, num_rows(t));
    ask(t, next, kAttentionKeys * rows_done / num_rows(t), row_bytes, s.ahead);
    uint64_t visible[kTogether];
    bool any[kTiles] = {}, all[kTiles] = {};
    const auto tiles = static_cast<int>(lesser(kTiles, num_tiles(t) - row / kTile));
    for (int i = 0; i < tiles; ++i) {
      uint64_t some = seen_by_all ? 1 : 0, every = ~uint64_t{0};
      for (int r = i * kTile; r < (i + 1) * kTile && !seen_by_all; ++r) {
        visible[r] = row + r < num_rows(t) ? visible_keys(t, row + r, base) : visible[r - 1];
        some |= visible[r], every &= visible[r];
      }
      any[i] = some != 0, all[i] = every == ~uint64_t{0};
      if (!any[i]) continue;
      const uint64_t* seen = &visible[i * kTile];
      all[i] ? Cache::template score<false>(t, s, row + i * kTile, i * kTile, seen)
             : Cache::template score<true>(t, s, row + i * kTile, i * kTile, seen);
    }
    for (int i = 0; i < tiles; ++i) {
      if (!any[i]) continue;
      const uint64_t* seen = &visible[i * kTile];
      all[i] ? Cache::template weigh<false>(s, row + i * kTile, i * kTile, seen)
             : Cache::template weigh<true>(s, row + i * kTile, i * kTile, seen);
    }
    for (int i = 0; i < tiles; ++i) {
      if (any[i]) Cache::add_values(t, s, row + i * kTile, i * kTile, &visible[i * kTile]);
    }
  }
}

template <typename Cache, int kDim>
inline void attend_chunk(const AttentionItem& t, AttentionState<kDim>& s, int64_t chunk) {
  using Value = typename Cache::Value;
  for (int64_t row = 0; row < num_tiles(t) * kTile; ++row) {
    s.chunk.m[row] = kLowest;
    store(s.lane_sums[row], zero());
    for (int64_t d = 0; d < kDim; d += kLanes) store(&s.chunk.acc[row][d], zero());
  }
  const int64_t last_of_first = last_key(t, 0), first_of_last = first_key(t, num_rows(t) - 1);
  // Whoever works on a chunk usually goes on to the next, so its first step is asked for, too.
  const int64_t visible_end = last_key(t, num_rows(t) - 1) + 1;
  const int64_t begin = greater(first_key(t, 0), chunk * kAttentionChunk);
  const int64_t end = lesser(visible_end, (chunk + 1) * kAttentionChunk);
  int64_t base = begin / kAttentionKeys * kAttentionKeys;
  locate(t, base, begin, end, s.slots[0]);
  for (int now = 0; base < end; base += kAttentionKeys, now ^= 1) {
    const Slots& slots = s.slots[now];
    Slots& next = s.slots[now ^ 1];
    locate(t, base + kAttentionKeys, begin, visible_end, next);
    look_ahead(t, next, t.head_dim * static_cast<int64_t>(sizeof(Value)), s);
    const bool run = slots.run && t.head_dim == kDim;
    run ? stage_keys<Value, true>(t, slots, s) : stage_keys<Value, false>(t, slots, s);
    Cache::stage_scales(t, slots, s);
    const bool seen_by_all = first_of_last <= base && last_of_first >= base + kAttentionKeys - 1;
    Cache::stage_values(t, slots, seen_by_all, s);
    attend_step<Cache>(t, next, s, base, seen_by_all);
  }
  for (int64_t row = 0; row < num_rows(t); ++row) {
    s.chunk.m[row] *= s.unit[row];
    s.chunk.l[row] = reduce_add(load(s.lane_sums[row]));
    Cache::put_in_order(s.chunk.acc[row]);
  }
}

template <typename Cache, int kDim>
inline void attend(const AttentionItem& t, AttentionState<kDim>& s) {
  // Rows past the last are zero: they fill up the last tile and are never stored.
  for (int64_t row = 0; row < num_tiles(t) * kTile; ++row) Cache::load_row(t, s, row);
  begin_at_sinks(t, s.total);
  for (int64_t chunk = t.begin_chunk; chunk < t.end_chunk; ++chunk) {
    attend_chunk<Cache>(t, s, chunk);
    finish_chunk(t, chunk, s.chunk, s.total);
  }
  if (t.partial == nullptr) store_rows(t, s.total);
}

template <int kDim>
inline void attention_of(const AttentionItem& t) {
  AttentionState<kDim> s;
  t.kv_dtype == DType::bf16 ? attend<Bf16Cache<kDim>>(t, s) : attend<Int8Cache<kDim>>(t, s);
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
