// Functions of a vector, written in the vocabulary. Included inside a kernel's namespace and target region.

// e^x to within 2 units in the last place for x in [-87.3, 88.7]; below, 0; above, infinity; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, so that r is exact enough), a degree-7 polynomial
// in r (coefficients: the Taylor series of e^r, whose next term is under 2^-27 of the sum), times 2^n.
struct ExpParts {
  f32v p, n;  // e^x = p 2^n
};
inline ExpParts exp_parts(f32v bounded) {
  const f32v n = round(mul(bounded, set1(1.44269504f)));
  f32v r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  f32v p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return {p, n};
}
constexpr float kExpLowest = -87.33654f;
inline f32v exp(f32v x) {
  const f32v lowest = set1(kExpLowest), highest = set1(88.72283f);
  const auto [p, n] = exp_parts(min(highest, max(lowest, x)));  // a NaN passes: the second operand wins
  // 2^128 is past the exponent field: halve n's share twice.
  const f32v half = round(mul(n, set1(0.5f)));
  f32v result = scale_by_pow2(scale_by_pow2(p, half), sub(n, half));
  result = select_lt(x, lowest, zero(), result);
  result = select_lt(highest, x, set1(float_from_bits(0x7f800000u)), result);
  return result;
}
// The same where x is 0, less or NaN.
inline f32v exp_of_no_more_than_0(f32v x) {
  const f32v lowest = set1(kExpLowest);
  const auto [p, n] = exp_parts(max(lowest, x));
  return select_lt(x, lowest, zero(), scale_by_pow2(p, n));
}
