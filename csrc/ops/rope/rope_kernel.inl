// One token's heads, in the vector vocabulary. Included inside a kernel's namespace and target region.

template <typename X, typename Y>
inline void rope_heads(const RopeToken& r) {
  const int64_t half = r.head_dim / 2;
  for (int64_t head = 0; head < r.num_heads; ++head) {
    const X* x = static_cast<const X*>(r.x) + head * r.head_dim;
    Y* y = static_cast<Y*>(r.y) + head * r.head_dim;
    for (int64_t i = 0; i < half; i += kLanes) {
      const int n = static_cast<int>(half - i < kLanes ? half - i : kLanes);
      const f32v x1 = load_n(x + i, n), x2 = load_n(x + half + i, n);
      const f32v c = load_n(r.cos + i, n), s = load_n(r.sin + i, n);
      store_n(y + i, sub(mul(x1, c), mul(x2, s)), n);
      store_n(y + half + i, add(mul(x2, c), mul(x1, s)), n);
    }
  }
}

inline void rope_any(const RopeToken& r) {
  const bool x_f32 = r.x_dtype == DType::f32, y_f32 = r.y_dtype == DType::f32;
  if (x_f32 && y_f32) return rope_heads<float, float>(r);
  if (x_f32) return rope_heads<float, bf16>(r);
  if (y_f32) return rope_heads<bf16, float>(r);
  return rope_heads<bf16, bf16>(r);
}
