// SwiGLU of a vector, in the vector vocabulary. Included inside a kernel's namespace and target region, after
// simd/math.inl.

// gate * sigmoid(alpha * gate) * (up + 1), both clamped. NaN passes through the clamps: the second operand wins.
inline f32v swiglu(f32v gate, f32v up, float alpha, float limit) {
  gate = min(set1(limit), gate);
  up = max(set1(-limit), min(set1(limit), up));
  const f32v sigmoid = div(set1(1.0f), add(set1(1.0f), exp(mul(set1(-alpha), gate))));
  return mul(mul(gate, sigmoid), add(up, set1(1.0f)));
}
