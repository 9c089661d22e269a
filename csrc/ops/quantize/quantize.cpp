#include "ops/quantize/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {

// Runs at load time only: portable code in loops that compilers turn into vectors, no dispatch.

void check_values(const char* name, const Tensor& values) {
  check_dtype(name, values, {DType::f32, DType::bf16});
  check_shape(name, values, {-1, -1}, "(rows, k)");
  check_value(values.shape[1] % kMxBlock == 0, name, " has ", values.shape[1], " columns; wanted a multiple of ",
              kMxBlock);
}

// A block in float32.
void load_block(const Tensor& values, int64_t row, int64_t block, float (&x)[kMxBlock]) {
  const int64_t at = row * values.stride[0] + block * kMxBlock;
  if (values.dtype == DType::f32) {
    std::memcpy(x, values.as<float>() + at, sizeof x);
  } else {
    for (int i = 0; i < kMxBlock; ++i) x[i] = to_float(values.as<bf16>()[at + i]);
  }
}

// Of finite numbers, whose magnitudes are ordered as their bits are.
float largest_magnitude(const float (&x)[kMxBlock]) {
  int32_t largest = 0;
  for (int i = 0; i < kMxBlock; ++i) {
    const auto magnitude = static_cast<int32_t>(bits_from_float(x[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return float_from_bits(static_cast<uint32_t>(largest));
}

void check_finite(const Tensor& values) {
  std::atomic<int64_t> bad_row{-1};
  parallel_for(values.shape[0], [&](int64_t row) {
    float x[kMxBlock];
    uint32_t bad = 0;
    for (int64_t b = 0; b < values.shape[1] / kMxBlock; ++b) {
      load_block(values, row, b, x);
      for (int i = 0; i < kMxBlock; ++i) bad |= (bits_from_float(x[i]) & 0x7f800000u) == 0x7f800000u;
    }
    if (bad != 0) bad_row.store(row, std::memory_order_relaxed);
  });
  check_value(bad_row.load() < 0, "x holds a NaN or infinity in row ", bad_row.load(), "; wanted finite numbers");
}

// The e2m1 code nearest to a magnitude. Its eight values are 0, .5, 1, 1.5, 2, 3, 4, 6; halfway goes to the even
// code. A count of the borders passed compiles without branches.
int nearest_e2m1(double magnitude) {
  return (magnitude > 0.25) + (magnitude >= 0.75) + (magnitude > 1.25) + (magnitude >= 1.75) + (magnitude > 2.5) +
         (magnitude >= 3.5) + (magnitude > 5.0);
}

void quantize_mx_block(const float (&x)[kMxBlock], uint8_t* codes, uint8_t* scale) {
  const float amax = largest_magnitude(x);
  int exponent = -127;  // a block of zeros
  if (amax > 0.0f) {
    std::frexp(amax, &exponent);  // amax = f * 2^exponent with f in [0.5, 1)
    exponent -= 3;                // floor(log2(amax)) - 2
  }
  if (exponent < -127) exponent = -127;
  *scale = static_cast<uint8_t>(exponent + 127);
  // In double, where 2^127 has a reciprocal that is not subnormal.
  const double inverse = std::ldexp(1.0, -exponent);
  for (int i = 0; i < kMxBlockBytes; ++i) {
    int byte = 0;
    for (int half = 0; half < 2; ++half) {
      const float value = x[2 * i + half];
      const int code = nearest_e2m1(std::fabs(value) * inverse) | (std::signbit(value) ? 8 : 0);
      byte |= code << (4 * half);
    }
    codes[i] = static_cast<uint8_t>(byte);
  }
}

// To nearest, ties to even, as bits: of magnitudes below 2^22 the sum with 1.5 * 2^23 keeps no fraction.
int32_t round_to_int(float x) {
  constexpr float kShift = 12582912.0f;
  return static_cast<int32_t>(bits_from_float(x + kShift) - bits_from_float(kShift));
}

// The smallest bfloat16 that 127 times is not below `amax`: the product of 8 significant bits and 7 is exact.
bf16 int8_scale(float amax) {
  bf16 scale{static_cast<uint16_t>(bits_from_float(amax / 127.0f) >> 16)};
  if (127.0 * static_cast<double>(to_float(scale)) < static_cast<double>(amax)) ++scale.bits;
  return scale;
}

bool is_finite(bf16 x) { return (x.bits & 0x7f80u) != 0x7f80u; }

}  // namespace

int64_t first_not_finite(const Tensor& x) {
  check_dtype("x", x, {DType::bf16});
  check_shape("x", x, {-1}, "(n)");
  check_contiguous("x", x);
  constexpr int64_t kPiece = int64_t{1} << 16;
  const int64_t n = x.shape[0];
  const bf16* values = x.as<bf16>();
  std::atomic<int64_t> first{n};
  parallel_for((n + kPiece - 1) / kPiece, [&](int64_t piece) {
    const int64_t begin = piece * kPiece, end = std::min(begin + kPiece, n);
    uint16_t bad = 0;
    for (int64_t i = begin; i < end; ++i) bad |= static_cast<uint16_t>(!is_finite(values[i]));
    if (bad == 0) return;
    const int64_t at = std::find_if_not(values + begin, values + end, is_finite) - values;
    int64_t before = first.load(std::memory_order_relaxed);
    while (at < before && !first.compare_exchange_weak(before, at, std::memory_order_relaxed)) {
    }
  });
  return first.load() < n ? first.load() : -1;
}

void mxfp4_dequantize(const Tensor& blocks, const Tensor& scales, const Tensor& values) {
  check_values("out", values);
  check_dtype("blocks", blocks, {DType::u8});
  check_dtype("scales", scales, {DType::u8});
  const int64_t rows = values.shape[0], per_row = values.shape[1] / kMxBlock;
  check_shape("blocks", blocks, {rows, per_row, kMxBlockBytes}, "(rows, k / 32, 16)");
  check_shape("scales", scales, {rows, per_row}, "(rows, k / 32)");
  check_contiguous("blocks", blocks);
  check_contiguous("scales", scales);
  check_no_overlap("out", values, "blocks", blocks);
  check_no_overlap("out", values, "scales", scales);
  parallel_for(rows, [&](int64_t row) {
    for (int64_t b = 0; b < per_row; ++b) {
      const uint8_t* codes = blocks.as<uint8_t>() + (row * per_row + b) * kMxBlockBytes;
      const float scale = e8m0_to_float(scales.as<uint8_t>()[row * per_row + b]);
      for (int i = 0; i < kMxBlock; ++i) {
        const int code = (codes[i / 2] >> (4 * (i % 2))) & 15;
        // Halving first is exact and keeps 6 * 2^127 the only product that leaves float32's range. -0 keeps its sign.
        const float magnitude = 0.5f * static_cast<float>(kE2m1Doubled[code & 7]) * scale;
        const float value = (code & 8) != 0 ? -magnitude : magnitude;
        const int64_t at = row * values.stride[0] + b * kMxBlock + i;
        if (values.dtype == DType::f32) {
          values.as<float>()[at] = value;
        } else {
          values.as<bf16>()[at] = to_bf16(value);
        }
      }
    }
  });
}

void mxfp4_quantize(const Tensor& values, const Tensor& blocks, const Tensor& scales) {
  check_values("x", values);
  check_dtype("blocks", blocks, {DType::u8});
  check_dtype("scales", scales, {DType::u8});
  const int64_t rows = values.shape[0], per_row = values.shape[1] / kMxBlock;
  check_shape("blocks", blocks, {rows, per_row, kMxBlockBytes}, "(rows, k / 32, 16)");
  check_shape("scales", scales, {rows, per_row}, "(rows, k / 32)");
  check_contiguous("blocks", blocks);
  check_contiguous("scales", scales);
  check_no_overlap("blocks", blocks, {{"x", values}, {"scales", scales}});
  check_no_overlap("scales", scales, "x", values);
  check_finite(values);
  parallel_for(rows, [&](int64_t row) {
    float x[kMxBlock];
    for (int64_t b = 0; b < per_row; ++b) {
      const int64_t at = row * per_row + b;
      load_block(values, row, b, x);
      quantize_mx_block(x, blocks.as<uint8_t>() + at * kMxBlockBytes, scales.as<uint8_t>() + at);
    }
  });
}

void int8_quantize(const Tensor& values, const Tensor& codes, const Tensor& scales) {
  check_values("x", values);
  check_dtype("codes", codes, {DType::i8});
  check_dtype("scales", scales, {DType::bf16});
  const int64_t rows = values.shape[0], per_row = values.shape[1] / kMxBlock;
  check_shape("codes", codes, {rows, values.shape[1]}, "(rows, k)");
  check_shape("scales", scales, {rows, per_row}, "(rows, k / 32)");
  check_contiguous("codes", codes);
  check_contiguous("scales", scales);
  check_no_overlap("codes", codes, {{"x", values}, {"scales", scales}});
  check_no_overlap("scales", scales, "x", values);
  check_finite(values);
  parallel_for(rows, [&](int64_t row) {
    float x[kMxBlock];
    for (int64_t b = 0; b < per_row; ++b) {
      load_block(values, row, b, x);
      const bf16 rounded = int8_scale(largest_magnitude(x));
      scales.as<bf16>()[row * per_row + b] = rounded;
      const float scale = to_float(rounded);
      int8_t* to = codes.as<int8_t>() + row * values.shape[1] + b * kMxBlock;
      // Nothing but zeros has scale 0.
      const float divisor = scale > 0.0f ? scale : std::numeric_limits<float>::infinity();
      for (int i = 0; i < kMxBlock; ++i) to[i] = static_cast<int8_t>(round_to_int(x[i] / divisor));
    }
  });
}

}  // namespace mxmoe
