// The tokens of one head into a cache, in the vector vocabulary. Included inside a kernel's namespace and target
// region.

inline int lanes_left(int64_t n, int64_t i) { return static_cast<int>(n - i < kLanes ? n - i : kLanes); }

template <typename X, typename C>
inline void convert_row(const X* x, int64_t n, C* to) {
  for (int64_t i = 0; i < n; i += kLanes) store_n(to + i, load_n(x + i, lanes_left(n, i)), lanes_left(n, i));
}

// Returns the scale. A NaN or an infinity makes it NaN; a row too small to have a reciprocal rounds to zero.
template <typename X>
inline float quantize_row(const X* x, int64_t n, int8_t* to) {
  f32v largest = zero(), poison = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const f32v v = load_n(x + i, lanes_left(n, i));
    largest = max(abs(v), largest);        // a NaN is passed over: the second operand wins
    poison = add(mul(v, zero()), poison);  // NaN once a value is not finite
  }
  const float amax = reduce_max(largest), not_finite = reduce_add(poison);
  const bool usable = amax > 1e-36f && not_finite == 0.0f;
  const float inverse = usable ? 127.0f / amax : 0.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = lanes_left(n, i);
    const f32v v = usable ? load_n(x + i, count) : zero();
    int8_t codes[kLanes];
    store_i8(codes, round(mul(v, set1(inverse))));
    std::memcpy(to + i, codes, static_cast<size_t>(count));
  }
  return amax / 127.0f + not_finite;
}

template <typename X>
inline void write_rows(const KvRows& r) {
  for (int64_t t = 0; t < r.num_tokens; ++t) {
    const int64_t block = r.slots[t] / r.block_size, offset = r.slots[t] - block * r.block_size;
    const int64_t row = (block * r.num_heads + r.head) * r.block_size + offset, at = row * r.head_dim;
    const X* x = static_cast<const X*>(r.x) + t * r.x_token_stride + r.head * r.head_dim;
    if (r.cache_dtype == DType::f32) convert_row(x, r.head_dim, static_cast<float*>(r.cache) + at);
    if (r.cache_dtype == DType::bf16) convert_row(x, r.head_dim, static_cast<bf16*>(r.cache) + at);
    if (r.cache_dtype == DType::i8) r.scales[row] = quantize_row(x, r.head_dim, static_cast<int8_t*>(r.cache) + at);
  }
}

inline void write_any(const KvRows& r) { r.x_dtype == DType::f32 ? write_rows<float>(r) : write_rows<bf16>(r); }
