// Rounds a row of activations to what a dot-product format takes. Included inside a kernel's namespace and
// target region.

template <typename X>
inline void prepare_f32(const X* x, int64_t k, const PreparedRows& to, int64_t row) {
  float* out = reinterpret_cast<float*>(static_cast<char*>(to.values) + row * to.value_stride);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) store(out + i, load(x + i));
  for (; i < k; ++i) out[i] = to_float(x[i]);
  for (const int64_t end = padded_k(k); i < end; ++i) out[i] = 0.0f;
}

// bf16 values; as float32 where no bf16 dot product is at hand.
template <typename X>
inline void prepare_bf16(const X* x, int64_t k, const PreparedRows& to, int64_t row) {
#if defined(MXMOE_SIMD_DOT)
  bf16* out = reinterpret_cast<bf16*>(static_cast<char*>(to.values) + row * to.value_stride);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) store(out + i, load(x + i));
  for (; i < k; ++i) out[i] = to_bf16(to_float(x[i]));
  for (const int64_t end = padded_k(k); i < end; ++i) out[i] = bf16{0};
#else
  float* out = reinterpret_cast<float*>(static_cast<char*>(to.values) + row * to.value_stride);
  bf16 rounded[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    store(rounded, load(x + i));
    store(out + i, load(rounded));
  }
  for (; i < k; ++i) out[i] = to_float(to_bf16(to_float(x[i])));
  for (const int64_t end = padded_k(k); i < end; ++i) out[i] = 0.0f;
#endif
}

// Rounds a block of 32 to codes = round(x / scale), scale = amax / 127, and returns the scale. A NaN or infinity
// makes it NaN.
template <typename X>
inline float quantize_block_i8(const X* x, int8_t* codes) {
  f32v largest = zero(), poison = zero();
  for (int i = 0; i < kMxBlock; i += kLanes) {
    const f32v v = load(x + i);
    largest = max(largest, abs(v));
    poison = fma(v, zero(), poison);
  }
  const float amax = reduce_max(largest), not_finite = reduce_add(poison);
  const bool usable = amax > 0.0f && not_finite == 0.0f;
  // A subnormal amax has no finite reciprocal: its block rounds to zero, within one subnormal of the truth.
  const float inverse = usable && amax > 1e-36f ? 127.0f / amax : 0.0f;
  for (int i = 0; i < kMxBlock; i += kLanes) {
    const f32v v = usable ? load(x + i) : zero();
    store_i8(codes + i, round(mul(v, set1(inverse))));
  }
  return amax / 127.0f + not_finite;
}

template <typename X>
inline void prepare_i8(const X* x, int64_t k, const PreparedRows& to, int64_t row) {
  int8_t* codes = static_cast<int8_t*>(to.values) + row * to.value_stride;
  float* scales = to.scales + row * to.block_stride;
  for (int64_t b = 0; b < k / kMxBlock; ++b) {
    scales[b] = quantize_block_i8(x + b * kMxBlock, codes + b * kMxBlock);
  }
}

constexpr PrepareFn kPrepareF32 = {prepare_f32<float>, prepare_f32<bf16>};
constexpr PrepareFn kPrepareBf16 = {prepare_bf16<float>, prepare_bf16<bf16>};
