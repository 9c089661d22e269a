// Dot-product formats, in the vector vocabulary. A format says how one step of K is loaded from an activation
// row and from a weight row, and how the two are multiplied into an accumulator; dot_tile.inl holds the
// loops. Included inside a kernel's namespace and target region.

inline float finish(f32v acc) { return reduce_add(acc); }
inline f32v zero_acc(f32v*) { return zero(); }
inline F8 zero_acc(F8*) { return zero_f8(); }

template <typename T>
inline const T* row_at(const void* base, int64_t row, int64_t stride_bytes) {
  return reinterpret_cast<const T*>(static_cast<const char*>(base) + row * stride_bytes);
}

// float32 (or bf16 held in float32) x bf16: one vector a step.
struct DotF32Bf16 {
  static constexpr int kStep = kLanes;
  static constexpr bool kBlockScaled = false;
  using Acc = f32v;
  using W = f32v;
  using A = f32v;
  static W weight(const WeightRows& w, int64_t row, int64_t step) {
    return load(row_at<bf16>(w.values, row, w.value_stride) + step * kStep);
  }
  static W weight_tail(const WeightRows& w, int64_t row, int64_t step, int n) {
    return load_n(row_at<bf16>(w.values, row, w.value_stride) + step * kStep, n);
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t step) {
    return load(row_at<float>(a.values, row, a.value_stride) + step * kStep);
  }
  static void mac(Acc& acc, const A& a, const W& w) { acc = fma(a, w, acc); }
};

// A block of 32 float32 activations.
struct ActBlockF32 {
  f32v x[kMxBlock / kLanes];
  static ActBlockF32 load_from(const PreparedRows& a, int64_t row, int64_t block) {
    const auto* p = row_at<float>(a.values, row, a.value_stride) + block * kMxBlock;
    ActBlockF32 r;
    for (int i = 0; i < kMxBlock / kLanes; ++i) r.x[i] = load(p + i * kLanes);
    return r;
  }
};

// The sum over the block first, then the scale: with exact weights that is one rounding a block.
struct WeightBlockF32 {
  f32v x[kMxBlock / kLanes];
  f32v scale;
  void mac(f32v& acc, const ActBlockF32& a) const {
    f32v sum = mul(a.x[0], x[0]);
    for (int i = 1; i < kMxBlock / kLanes; ++i) sum = fma(a.x[i], x[i], sum);
    acc = fma(sum, scale, acc);
  }
};

// float32 x int8 with a bf16 scale per block.
struct DotF32I8 {
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = f32v;
  using W = WeightBlockF32;
  using A = ActBlockF32;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    const auto* p = row_at<int8_t>(w.values, row, w.value_stride) + block * kMxBlock;
    W r;
    for (int i = 0; i < kMxBlock / kLanes; ++i) r.x[i] = load(p + i * kLanes);
    r.scale = set1(to_float(row_at<bf16>(w.scales, row, w.scale_stride)[block]));
    return r;
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t block) { return A::load_from(a, row, block); }
  static void mac(Acc& acc, const A& a, const W& w) { w.mac(acc, a); }
};

// float32 x MXFP4. The codes are decoded doubled, the scale halved: both exact.
struct DotF32Mxfp4 {
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = f32v;
  using W = WeightBlockF32;
  using A = ActBlockF32;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    const auto* p = row_at<uint8_t>(w.values, row, w.value_stride) + block * kMxBlockBytes;
    W r;
    decode_e2m1(p, r.x);
    r.scale = set1(0.5f * e8m0_to_float(row_at<uint8_t>(w.scales, row, w.scale_stride)[block]));
    return r;
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t block) { return A::load_from(a, row, block); }
  static void mac(Acc& acc, const A& a, const W& w) { w.mac(acc, a); }
};

// int8 activations: the products of a block are summed exactly, then scaled by both scales.
struct ScaledA8 {
  A8 x;
  float scale;
};
struct ScaledW8 {
  W8 x;
  float scale;
};

template <int Offset>
inline ScaledA8 load_scaled_a8(const PreparedRows& a, int64_t row, int64_t block) {
  return {load_a8<Offset>(row_at<int8_t>(a.values, row, a.value_stride) + block * kMxBlock),
          a.scales[row * a.block_stride + block]};
}

struct DotI8I8 {
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = F8;
  using W = ScaledW8;
  using A = ScaledA8;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    return {load_w8(row_at<int8_t>(w.values, row, w.value_stride) + block * kMxBlock),
            to_float(row_at<bf16>(w.scales, row, w.scale_stride)[block])};
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t block) {
    return load_scaled_a8<128>(a, row, block);
  }
  static void mac(Acc& acc, const A& a, const W& w) { mac8(acc, a.x, w.x, a.scale * w.scale); }
};

struct DotI8Mxfp4 {
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = F8;
  using W = ScaledW8;
  using A = ScaledA8;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    return {decode_w8(row_at<uint8_t>(w.values, row, w.value_stride) + block * kMxBlockBytes),
            0.5f * e8m0_to_float(row_at<uint8_t>(w.scales, row, w.scale_stride)[block])};
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t block) { return load_scaled_a8<12>(a, row, block); }
  static void mac(Acc& acc, const A& a, const W& w) { mac8(acc, a.x, w.x, a.scale * w.scale); }
};

#if defined(MXMOE_SIMD_DOT)
// bf16 dot products: vdpbf16ps adds the products of value pairs to float32 lanes; subnormal inputs count as
// zero.
struct DotBf16Bf16 {
  static constexpr int kStep = 32;
  static constexpr bool kBlockScaled = false;
  using Acc = f32v;
  using W = __m512bh;
  using A = __m512bh;
  static W weight(const WeightRows& w, int64_t row, int64_t step) {
    return (__m512bh)_mm512_loadu_si512(row_at<bf16>(w.values, row, w.value_stride) + step * kStep);
  }
  static W weight_tail(const WeightRows& w, int64_t row, int64_t step, int n) {
    const auto first_n = static_cast<__mmask32>((uint32_t{1} << n) - 1u);
    return (__m512bh)_mm512_maskz_loadu_epi16(first_n, row_at<bf16>(w.values, row, w.value_stride) + step * kStep);
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t step) {
    return (__m512bh)_mm512_loadu_si512(row_at<bf16>(a.values, row, a.value_stride) + step * kStep);
  }
  static void mac(Acc& acc, const A& a, const W& w) { acc.v = _mm512_dpbf16_ps(acc.v, a, w); }
};

struct WeightBlockBf16 {
  __m512bh x;
  f32v scale;
};

inline void mac_scaled_bf16(f32v& acc, __m512bh a, const WeightBlockBf16& w) {
  const f32v sum = {_mm512_dpbf16_ps(_mm512_setzero_ps(), a, w.x)};
  acc = fma(sum, w.scale, acc);
}

struct DotBf16I8 {
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = f32v;
  using W = WeightBlockBf16;
  using A = __m512bh;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    const auto* p = row_at<int8_t>(w.values, row, w.value_stride) + block * kMxBlock;
    return {_mm512_cvtne2ps_pbh(load(p + 16).v, load(p).v),
            set1(to_float(row_at<bf16>(w.scales, row, w.scale_stride)[block]))};
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t block) {
    return DotBf16Bf16::activation(a, row, block);
  }
  static void mac(Acc& acc, const A& a, const W& w) { mac_scaled_bf16(acc, a, w); }
};

struct DotBf16Mxfp4 {
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = f32v;
  using W = WeightBlockBf16;
  using A = __m512bh;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    // The doubled values as bf16 bit patterns; the permute looks at the low five bits, so the table stands
    // twice.
    const __m512i table = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40c0, 0x4100, 0x4140, static_cast<short>(0x8000),
                          static_cast<short>(0xbf80), static_cast<short>(0xc000), static_cast<short>(0xc040),
                          static_cast<short>(0xc080), static_cast<short>(0xc0c0), static_cast<short>(0xc100),
                          static_cast<short>(0xc140)));
    const auto* p = row_at<uint8_t>(w.values, row, w.value_stride) + block * kMxBlockBytes;
    // Each byte to a 32-bit lane, its high nibble to the lane's upper half.
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i codes =
        _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi32(x, 12)), _mm512_set1_epi32(0x000f000f));
    return {(__m512bh)_mm512_permutexvar_epi16(codes, table),
            set1(0.5f * e8m0_to_float(row_at<uint8_t>(w.scales, row, w.scale_stride)[block]))};
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t block) {
    return DotBf16Bf16::activation(a, row, block);
  }
  static void mac(Acc& acc, const A& a, const W& w) { mac_scaled_bf16(acc, a, w); }
};
#endif  // MXMOE_SIMD_DOT
