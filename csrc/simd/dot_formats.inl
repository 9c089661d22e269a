// Dot-product formats, row by row, of portable code: how a step of K is loaded from an activation row and from a
// weight row, and how the two are multiplied into an accumulator; dot_tile.inl holds the loops. Included inside a
// kernel's namespace and target region.

inline float finish(f32v acc) { return reduce_add(acc); }
inline f32v zero_acc(f32v*) { return zero(); }
inline F8 zero_acc(F8*) { return zero_f8(); }

template <typename T>
inline const T* row_at(const void* base, int64_t row, int64_t stride_bytes) {
  return reinterpret_cast<const T*>(static_cast<const char*>(base) + row * stride_bytes);
}

// Where a step of a weight row lies. Packed rows are put together in `own`: any kernel takes either layout, only
// those made for panels take the packed one at full speed.
inline const void* packed_block(const WeightRows& w, int64_t row, int64_t block) {
  return static_cast<const char*>(w.values) + row / kPanelRows * w.value_stride + block * w.value_block;
}
inline const uint8_t* mxfp4_codes(const WeightRows& w, int64_t row, int64_t block, uint8_t (&own)[kMxBlockBytes]) {
  if (!w.packed) return row_at<uint8_t>(w.values, row, w.value_stride) + block * kMxBlockBytes;
  unpack_row(packed_block(w, row, block), row % kPanelRows, kMxBlockBytes / 4, unpack_codes, own);
  return own;
}
inline const int8_t* int8_codes(const WeightRows& w, int64_t row, int64_t block, int8_t (&own)[kMxBlock]) {
  if (!w.packed) return row_at<int8_t>(w.values, row, w.value_stride) + block * kMxBlock;
  unpack_row(packed_block(w, row, block), row % kPanelRows, kMxBlock / 4, flip_signs, own);
  return own;
}
template <typename T>
inline T block_scale(const WeightRows& w, int64_t row, int64_t block) {
  if (!w.packed) return row_at<T>(w.scales, row, w.scale_stride)[block];
  const char* panel = static_cast<const char*>(w.scales) + row / kPanelRows * w.scale_stride;
  return reinterpret_cast<const T*>(panel + block * w.scale_block)[row % kPanelRows];
}
inline float mxfp4_scale(const WeightRows& w, int64_t row, int64_t block) {
  return 0.5f * e8m0_to_float(block_scale<uint8_t>(w, row, block));
}
inline float int8_scale(const WeightRows& w, int64_t row, int64_t block) {
  return to_float(block_scale<bf16>(w, row, block));
}

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

// float32 (or bf16 held in float32) x bf16: the sum over a block first, as of the formats with scales.
struct DotF32Bf16 {
  static constexpr int kBits = 16;  // of a weight
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = false;
  struct W {
    f32v x[kMxBlock / kLanes];
  };
  using Acc = f32v;
  using A = ActBlockF32;
  static W weight(const WeightRows& w, int64_t row, int64_t step) {
    if (!w.packed) return weight_tail(w, row, step, kStep);
    bf16 own[kStep];
    const auto* block = static_cast<const bf16*>(packed_block(w, row, step));
    for (int i = 0; i < kStep; ++i) own[i] = block[(i / 2 * kPanelRows + row % kPanelRows) * 2 + i % 2];
    return weight_of(own, kStep);
  }
  static W weight_tail(const WeightRows& w, int64_t row, int64_t step, int n) {
    return weight_of(row_at<bf16>(w.values, row, w.value_stride) + step * kStep, n);
  }
  static W weight_of(const bf16* p, int n) {
    W r;
    for (int i = 0; i < kMxBlock / kLanes; ++i) {
      const int left = n - i * kLanes;
      r.x[i] = left >= kLanes ? load(p + i * kLanes) : left > 0 ? load_n(p + i * kLanes, left) : zero();
    }
    return r;
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t step) { return A::load_from(a, row, step); }
  static void mac(Acc& acc, const A& a, const W& w) {
    f32v sum = mul(a.x[0], w.x[0]);
    for (int i = 1; i < kMxBlock / kLanes; ++i) sum = fma(a.x[i], w.x[i], sum);
    acc = add(acc, sum);
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
  static constexpr int kBits = 8;  // of a weight
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = f32v;
  using W = WeightBlockF32;
  using A = ActBlockF32;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    int8_t own[kMxBlock];
    const int8_t* p = int8_codes(w, row, block, own);
    W r;
    for (int i = 0; i < kMxBlock / kLanes; ++i) r.x[i] = load(p + i * kLanes);
    r.scale = set1(int8_scale(w, row, block));
    return r;
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t block) { return A::load_from(a, row, block); }
  static void mac(Acc& acc, const A& a, const W& w) { w.mac(acc, a); }
};

// float32 x MXFP4. The codes are decoded doubled, the scale halved: both exact.
struct DotF32Mxfp4 {
  static constexpr int kBits = 4;  // of a weight
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = f32v;
  using W = WeightBlockF32;
  using A = ActBlockF32;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    uint8_t own[kMxBlockBytes];
    W r;
    decode_e2m1(mxfp4_codes(w, row, block, own), r.x);
    r.scale = set1(mxfp4_scale(w, row, block));
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
  static constexpr int kBits = 8;  // of a weight
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = F8;
  using W = ScaledW8;
  using A = ScaledA8;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    int8_t own[kMxBlock];
    return {load_w8(int8_codes(w, row, block, own)), int8_scale(w, row, block)};
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t block) {
    return load_scaled_a8<128>(a, row, block);
  }
  static void mac(Acc& acc, const A& a, const W& w) { mac8(acc, a.x, w.x, a.scale * w.scale); }
};

struct DotI8Mxfp4 {
  static constexpr int kBits = 4;  // of a weight
  static constexpr int kStep = kMxBlock;
  static constexpr bool kBlockScaled = true;
  using Acc = F8;
  using W = ScaledW8;
  using A = ScaledA8;
  static W weight(const WeightRows& w, int64_t row, int64_t block) {
    uint8_t own[kMxBlockBytes];
    return {decode_w8(mxfp4_codes(w, row, block, own)), mxfp4_scale(w, row, block)};
  }
  static A activation(const PreparedRows& a, int64_t row, int64_t block) { return load_scaled_a8<12>(a, row, block); }
  static void mac(Acc& acc, const A& a, const W& w) { mac8(acc, a.x, w.x, a.scale * w.scale); }
};
