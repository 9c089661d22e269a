// Rounds activations to bfloat16 and then to integers of 16 bits, for CPUs that multiply those faster than bfloat16.
// Included inside a kernel's namespace and target region.

// Rounds a block of 32 to bfloat16 and then to codes = round(x / scale), and returns the scale: 2^-14 of the power of
// two in the block's largest magnitude, or of the next one if all eight bits of that are ones, so that codes are at
// most 32512 and can be split in two signed bytes. What is at least a 128th of that power keeps all eight bits; what
// is less is off by half a scale at most, a 128th of what rounding the largest may have cost. A NaN or infinity makes
// the scale NaN.
template <typename X>
inline float quantize_block_i16(const X* x, int16_t* codes) {
  constexpr uint32_t kExponent = 0x7f800000, kCodeBits = 14u << 23, kOne = 127u << 23, kLastBit = 1u << 16;
  // Blocks of less than 2^-95 count as if they reached it: scales and their reciprocals are normal numbers.
  constexpr uint32_t kSmallest = 32u << 23;
  f32v rounded[kMxBlock / kLanes], largest = zero(), poison = zero();
  for (int i = 0; i < kMxBlock / kLanes; ++i) {
    rounded[i] = rounded_to_bf16(load(x + i * kLanes));
    largest = max(largest, abs(rounded[i]));
    poison = fma(rounded[i], zero(), poison);
  }
  const float not_finite = reduce_add(poison);
  const uint32_t found = (bits_from_float(reduce_max(largest)) + kLastBit) & kExponent;
  const uint32_t exponent = found < kSmallest ? kSmallest : found;
  const f32v inverse = set1(float_from_bits(2 * kOne + kCodeBits - exponent));
  for (int i = 0; i < kMxBlock / kLanes; ++i) {
    store_i16(codes + i * kLanes, not_finite == 0.0f ? mul(rounded[i], inverse) : zero());
  }
  return float_from_bits(exponent - kCodeBits) + not_finite;
}

// The rows that a format of 16-bit integers takes: F::kUnit is what an integer of its weights is worth, F::kRaise
// what was added to them, and with F::kEvenFirst it wants each four values as 0, 2, 1, 3.
template <class F, typename X>
inline void prepare_panel_i16(const X* x, int64_t k, const PreparedRows& to, int64_t row) {
  char* values = static_cast<char*>(to.values) + row * to.value_stride;
  BlockMeta* meta = reinterpret_cast<BlockMeta*>(to.scales + row * to.block_stride);
  for (int64_t b = 0; b < k / kMxBlock; ++b) {
    int16_t codes[kMxBlock];
    meta[b].scale = F::kUnit * quantize_block_i16(x + b * kMxBlock, codes);
    int32_t sum = 0;
    for (const int16_t code : codes) sum += code;
    meta[b].start = -F::kRaise * sum;
    uint64_t fours[kMxBlock / 4];
    std::memcpy(fours, codes, sizeof fours);
    for (uint64_t& x4 : fours) {
      if (F::kEvenFirst) x4 = (x4 & 0xffff00000000ffffu) | (x4 & 0xffff0000u) << 16 | (x4 >> 16 & 0xffff0000u);
    }
    std::memcpy(values + b * sizeof fours, fours, sizeof fours);
  }
}
template <class F>
constexpr PrepareFn kPreparePanelI16 = {prepare_panel_i16<F, float>, prepare_panel_i16<F, bf16>};
