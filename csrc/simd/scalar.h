// The vector vocabulary in portable C++: four lanes that any compiler may map to what the machine has.
// The other headers of this folder say the same words in their instruction set; kernels are written once in
// them.
#pragma once

#include <cmath>

#include "core/fetch.h"
#include "core/types.h"

#define MXMOE_SIMD scalar

namespace mxmoe {
namespace scalar {

constexpr int kLanes = 4;

struct f32v {
  float lane[kLanes];
};

inline f32v set1(float x) { return {{x, x, x, x}}; }
inline f32v zero() { return set1(0.0f); }
inline f32v load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline void store(float* p, f32v v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v.lane[i];
}
// The first n lanes, the rest zero; lanes past n are neither read nor written.
inline f32v load_n(const float* p, int n) {
  f32v v = zero();
  for (int i = 0; i < n; ++i) v.lane[i] = p[i];
  return v;
}
inline void store_n(float* p, f32v v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v.lane[i];
}
inline f32v load(const bf16* p) {
  f32v v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = to_float(p[i]);
  return v;
}
inline f32v load_n(const bf16* p, int n) {
  f32v v = zero();
  for (int i = 0; i < n; ++i) v.lane[i] = to_float(p[i]);
  return v;
}
inline f32v rounded_to_bf16(f32v v) {
  for (float& x : v.lane) x = to_float(to_bf16(x));
  return v;
}
inline void store(bf16* p, f32v v) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(v.lane[i]);
}
inline void store_n(bf16* p, f32v v, int n) {
  for (int i = 0; i < n; ++i) p[i] = to_bf16(v.lane[i]);
}
inline f32v load(const int8_t* p) {
  f32v v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = static_cast<float>(p[i]);
  return v;
}
inline f32v load_n(const int8_t* p, int n) {
  f32v v = zero();
  for (int i = 0; i < n; ++i) v.lane[i] = static_cast<float>(p[i]);
  return v;
}

#define MXMOE_LANEWISE(name, expression)        \
  inline f32v name(f32v a, f32v b) {            \
    f32v r;                                     \
    for (int i = 0; i < kLanes; ++i) {          \
      const float x = a.lane[i], y = b.lane[i]; \
      r.lane[i] = expression;                   \
    }                                           \
    return r;                                   \
  }
MXMOE_LANEWISE(add, x + y)
MXMOE_LANEWISE(sub, x - y)
MXMOE_LANEWISE(mul, x* y)
MXMOE_LANEWISE(div, x / y)
// As x86 does: the second operand when either is NaN.
MXMOE_LANEWISE(min, x < y ? x : y)
MXMOE_LANEWISE(max, x > y ? x : y)
#undef MXMOE_LANEWISE

// a * b + c; rounded twice here, once where the machine has a fused instruction.
inline f32v fma(f32v a, f32v b, f32v c) { return add(mul(a, b), c); }
inline f32v abs(f32v v) {
  for (int i = 0; i < kLanes; ++i) v.lane[i] = std::fabs(v.lane[i]);
  return v;
}
inline f32v round(f32v v) {  // to nearest, ties to even
  for (int i = 0; i < kLanes; ++i) v.lane[i] = std::nearbyint(v.lane[i]);
  return v;
}
// v * 2^n for whole n in [-126, 127].
inline f32v scale_by_pow2(f32v v, f32v n) {
  for (int i = 0; i < kLanes; ++i) {
    const bool in_range = n.lane[i] >= -126.0f && n.lane[i] <= 127.0f;  // NaN has no integer to convert to
    const int32_t exponent = in_range ? static_cast<int32_t>(n.lane[i]) : 0;
    v.lane[i] *= float_from_bits(static_cast<uint32_t>(exponent + 127) << 23);
  }
  return v;
}
// Lanes where a < b take x, the others y.
inline f32v select_lt(f32v a, f32v b, f32v x, f32v y) {
  for (int i = 0; i < kLanes; ++i) y.lane[i] = a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i];
  return y;
}
inline f32v iota() { return {{0, 1, 2, 3}}; }
inline void transpose(f32v (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = rows[i].lane[j];
      rows[i].lane[j] = rows[j].lane[i], rows[j].lane[i] = x;
    }
  }
}
inline float reduce_add(f32v v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }
inline float reduce_max(f32v v) {
  const f32v m = max(v, f32v{{v.lane[2], v.lane[3], v.lane[0], v.lane[1]}});
  return m.lane[0] > m.lane[1] ? m.lane[0] : m.lane[1];
}
inline void store_i8(int8_t* p, f32v v) {  // whole numbers in [-128, 127]
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(v.lane[i]);
}

// --- blocks of 32 values for dot products ---

// The e2m1 codes of a block, doubled so that they are integers.
inline void decode_e2m1(const uint8_t* p, f32v (&out)[kMxBlock / kLanes]) {
  for (int i = 0; i < kMxBlock; ++i) {
    out[i / kLanes].lane[i % kLanes] = kE2m1Doubled[(p[i / 2] >> (4 * (i % 2))) & 15];
  }
}

// int8 blocks: A8 of activations, W8 of weights, F8 the float lanes their exact integer products are added
// to.
struct A8 {
  const int8_t* x;
};
struct W8 {
  int8_t x[kMxBlock];
};
struct F8 {
  float v;
};
inline F8 zero_f8() { return {0.0f}; }
// Offset: what a W8 may have been raised by to become unsigned.
template <int Offset>
inline A8 load_a8(const int8_t* p) {
  return {p};
}
inline W8 load_w8(const int8_t* p) {
  W8 w;
  std::memcpy(w.x, p, sizeof w.x);
  return w;
}
inline W8 decode_w8(const uint8_t* p) {
  W8 w;
  for (int i = 0; i < kMxBlock; ++i) w.x[i] = kE2m1Doubled[(p[i / 2] >> (4 * (i % 2))) & 15];
  return w;
}
inline void mac8(F8& acc, const A8& a, const W8& w, float scale) {
  int32_t dot = 0;
  for (int i = 0; i < kMxBlock; ++i) dot += static_cast<int32_t>(a.x[i]) * w.x[i];
  acc.v += static_cast<float>(dot) * scale;
}
inline float finish(const F8& acc) { return acc.v; }

}  // namespace scalar
}  // namespace mxmoe
