// The row kernel of rmsnorm, in the vector vocabulary. Included inside a kernel's namespace and target
// region.

template <typename X, typename W, typename Y>
inline void rmsnorm_row(const X* x, const W* weight, Y* y, int64_t n, float eps) {
  // Several sums side by side: shorter chains of additions round less and wait less.
  constexpr int kSums = 4;
  f32v squares[kSums] = {zero(), zero(), zero(), zero()};
  const int64_t whole = n / kLanes * kLanes;
  const int rest = static_cast<int>(n - whole);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const f32v v = load(x + i);
    f32v& sum = squares[i / kLanes % kSums];
    sum = fma(v, v, sum);
  }
  if (rest > 0) {
    const f32v v = load_n(x + whole, rest);
    squares[0] = fma(v, v, squares[0]);
  }
  const f32v sum = add(add(squares[0], squares[1]), add(squares[2], squares[3]));
  const float mean = reduce_add(sum) / static_cast<float>(n);
  const f32v inverse = set1(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < whole; i += kLanes) store(y + i, mul(mul(load(x + i), inverse), load(weight + i)));
  if (rest > 0) {
    store_n(y + whole, mul(mul(load_n(x + whole, rest), inverse), load_n(weight + whole, rest)), rest);
  }
}

template <typename X, typename W>
inline void rmsnorm_to(const RmsnormRow& r) {
  const X* x = static_cast<const X*>(r.x);
  const W* weight = static_cast<const W*>(r.weight);
  if (r.y_dtype == DType::f32) {
    rmsnorm_row(x, weight, static_cast<float*>(r.y), r.hidden_size, r.eps);
  } else {
    rmsnorm_row(x, weight, static_cast<bf16*>(r.y), r.hidden_size, r.eps);
  }
}

inline void rmsnorm_any(const RmsnormRow& r) {
  const bool x_f32 = r.x_dtype == DType::f32, w_f32 = r.weight_dtype == DType::f32;
  if (x_f32 && w_f32) return rmsnorm_to<float, float>(r);
  if (x_f32) return rmsnorm_to<float, bf16>(r);
  if (w_f32) return rmsnorm_to<bf16, float>(r);
  return rmsnorm_to<bf16, bf16>(r);
}
