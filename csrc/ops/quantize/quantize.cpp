#include "ops/quantize/quantize.h"

#include <atomic>
#include <cmath>

#include "core/check.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {

// Runs at load time only, where the disk is the limit: portable code, no dispatch.

float value_at(const Tensor& t, int64_t row, int64_t i) {
  const int64_t at = row * t.stride[0] + i;
  return t.dtype == DType::f32 ? t.as<float>()[at] : to_float(t.as<bf16>()[at]);
}

void check_values(const Tensor& values) {
  check_dtype("values", values, {DType::f32, DType::bf16});
  check_shape("values", values, {-1, -1}, "(rows, k)");
  check_value(values.shape[1] % kMxBlock == 0, "values has ", values.shape[1], " columns; wanted a multiple of ",
              kMxBlock);
}

void check_finite(const Tensor& values) {
  std::atomic<int64_t> bad_row{-1};
  parallel_for(values.shape[0], [&](int64_t row) {
    for (int64_t i = 0; i < values.shape[1]; ++i) {
      if (!std::isfinite(value_at(values, row, i))) bad_row.store(row, std::memory_order_relaxed);
    }
  });
  check_value(bad_row.load() < 0, "values holds a NaN or infinity in row ", bad_row.load(), "; wanted finite numbers");
}

// The e2m1 code nearest to a magnitude. Its eight values are 0, .5, 1, 1.5, 2, 3, 4, 6; halfway goes to the even code.
int nearest_e2m1(float magnitude) {
  if (magnitude <= 0.25f) return 0;
  if (magnitude < 0.75f) return 1;
  if (magnitude <= 1.25f) return 2;
  if (magnitude < 1.75f) return 3;
  if (magnitude <= 2.5f) return 4;
  if (magnitude < 3.5f) return 5;
  if (magnitude <= 5.0f) return 6;
  return 7;
}

void quantize_mx_block(const Tensor& values, int64_t row, int64_t block, uint8_t* codes, uint8_t* scale) {
  float amax = 0.0f;
  for (int i = 0; i < kMxBlock; ++i) amax = std::fmax(amax, std::fabs(value_at(values, row, block * kMxBlock + i)));
  int exponent = -127;  // a block of zeros
  if (amax > 0.0f) {
    std::frexp(amax, &exponent);  // amax = f * 2^exponent with f in [0.5, 1)
    exponent -= 3;                // floor(log2(amax)) - 2
  }
  if (exponent < -127) exponent = -127;
  *scale = static_cast<uint8_t>(exponent + 127);
  for (int i = 0; i < kMxBlockBytes; ++i) {
    int byte = 0;
    for (int half = 0; half < 2; ++half) {
      const float x = value_at(values, row, block * kMxBlock + 2 * i + half);
      const int code = nearest_e2m1(std::ldexp(std::fabs(x), -exponent)) | (std::signbit(x) ? 8 : 0);
      byte |= code << (4 * half);
    }
    codes[i] = static_cast<uint8_t>(byte);
  }
}

// The smallest bfloat16 that is not below a positive float.
bf16 round_up(float x) {
  const uint32_t bits = bits_from_float(x);
  return bf16{static_cast<uint16_t>((bits + 0xffffu) >> 16)};
}

}  // namespace

void mxfp4_dequantize(const Tensor& blocks, const Tensor& scales, const Tensor& values) {
  check_values(values);
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
  check_values(values);
  check_dtype("blocks", blocks, {DType::u8});
  check_dtype("scales", scales, {DType::u8});
  const int64_t rows = values.shape[0], per_row = values.shape[1] / kMxBlock;
  check_shape("blocks", blocks, {rows, per_row, kMxBlockBytes}, "(rows, k / 32, 16)");
  check_shape("scales", scales, {rows, per_row}, "(rows, k / 32)");
  check_contiguous("blocks", blocks);
  check_contiguous("scales", scales);
  check_no_overlap("blocks", blocks, "values", values);
  check_no_overlap("scales", scales, "values", values);
  check_finite(values);
  parallel_for(rows, [&](int64_t row) {
    for (int64_t b = 0; b < per_row; ++b) {
      const int64_t at = row * per_row + b;
      quantize_mx_block(values, row, b, blocks.as<uint8_t>() + at * kMxBlockBytes, scales.as<uint8_t>() + at);
    }
  });
}

void int8_quantize(const Tensor& values, const Tensor& codes, const Tensor& scales) {
  check_values(values);
  check_dtype("codes", codes, {DType::i8});
  check_dtype("scales", scales, {DType::bf16});
  const int64_t rows = values.shape[0], per_row = values.shape[1] / kMxBlock;
  check_shape("codes", codes, {rows, values.shape[1]}, "(rows, k)");
  check_shape("scales", scales, {rows, per_row}, "(rows, k / 32)");
  check_contiguous("codes", codes);
  check_contiguous("scales", scales);
  check_no_overlap("codes", codes, "values", values);
  check_no_overlap("scales", scales, "values", values);
  check_finite(values);
  parallel_for(rows, [&](int64_t row) {
    for (int64_t b = 0; b < per_row; ++b) {
      float amax = 0.0f;
      for (int i = 0; i < kMxBlock; ++i) amax = std::fmax(amax, std::fabs(value_at(values, row, b * kMxBlock + i)));
      const bf16 scale = round_up(amax / 127.0f);
      scales.as<bf16>()[row * per_row + b] = scale;
      for (int i = 0; i < kMxBlock; ++i) {
        const float x = value_at(values, row, b * kMxBlock + i);
        // amax / 127 may underflow to zero: then so do the values.
        const float code = to_float(scale) > 0.0f ? std::nearbyint(x / to_float(scale)) : 0.0f;
        codes.as<int8_t>()[row * values.shape[1] + b * kMxBlock + i] = static_cast<int8_t>(code);
      }
    }
  });
}

}  // namespace mxmoe
