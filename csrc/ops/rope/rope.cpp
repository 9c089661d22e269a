#include "ops/rope/rope.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/isa.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {
Dispatch<RopeKernel> table("rope", {MXMOE_X86({"rope_avx512", kAvx512, rope_avx512}, {"rope_avx2", kAvx2, rope_avx2}){
                                       "rope_scalar", 0, rope_scalar}});

constexpr double kPi = 3.14159265358979323846;

// The (fractional) dimension whose wavelength turns `rotations` times within the original context.
double correction_dim(double rotations, double head_dim, const YarnParams& yarn) {
  const double context = static_cast<double>(yarn.original_max_position_embeddings);
  return head_dim * std::log(context / (rotations * 2.0 * kPi)) / (2.0 * std::log(yarn.theta));
}
}  // namespace

double rope_inv_freq(int64_t head_dim, const YarnParams& yarn, double* inv_freq) {
  check_value(head_dim >= 2 && head_dim % 2 == 0, "head_dim is ", head_dim, "; wanted an even number, 2 or more");
  check_value(std::isfinite(yarn.theta) && yarn.theta > 1.0, "theta is ", yarn.theta, "; wanted a number above 1");
  check_value(std::isfinite(yarn.factor) && yarn.factor >= 1.0, "factor is ", yarn.factor, "; wanted 1 or more");
  check_value(yarn.original_max_position_embeddings >= 1, "original_max_position_embeddings is ",
              yarn.original_max_position_embeddings, "; wanted 1 or more");
  check_value(yarn.beta_slow > 0.0 && yarn.beta_fast >= yarn.beta_slow && std::isfinite(yarn.beta_fast),
              "beta_fast and beta_slow are ", yarn.beta_fast, " and ", yarn.beta_slow,
              "; wanted beta_fast >= beta_slow > 0");
  const int64_t half = head_dim / 2;
  const double dim = static_cast<double>(head_dim);
  for (int64_t i = 0; i < half; ++i) inv_freq[i] = std::pow(yarn.theta, -2.0 * static_cast<double>(i) / dim);
  if (yarn.factor == 1.0) return 1.0;

  // Below `low` the frequencies stay, above `high` they are divided by the factor, between they blend.
  double low = correction_dim(yarn.beta_fast, dim, yarn), high = correction_dim(yarn.beta_slow, dim, yarn);
  if (yarn.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0), high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;  // a step, without dividing by zero
  for (int64_t i = 0; i < half; ++i) {
    const double ramp = std::min(1.0, std::max(0.0, (static_cast<double>(i) - low) / (high - low)));
    inv_freq[i] = inv_freq[i] * (1.0 - ramp) + inv_freq[i] / yarn.factor * ramp;
  }
  return 0.1 * std::log(yarn.factor) + 1.0;
}

void rope_cos_sin(const Tensor& positions, const Tensor& inv_freq, double scaling, const Tensor& cos,
                  const Tensor& sin) {
  check_dtype("positions", positions, {DType::i64});
  check_dtype("inv_freq", inv_freq, {DType::f64});
  check_shape("positions", positions, {-1}, "(num_tokens,)");
  check_shape("inv_freq", inv_freq, {-1}, "(head_dim / 2,)");
  const int64_t num_tokens = positions.shape[0], half = inv_freq.shape[0];
  for (const auto* t : {&cos, &sin}) {
    check_dtype(t == &cos ? "cos" : "sin", *t, {DType::f32});
    check_shape(t == &cos ? "cos" : "sin", *t, {num_tokens, half}, "(num_tokens, head_dim / 2)");
    check_contiguous(t == &cos ? "cos" : "sin", *t);
  }
  check_no_overlap("cos", cos, {{"sin", sin}, {"positions", positions}, {"inv_freq", inv_freq}});
  check_no_overlap("sin", sin, {{"positions", positions}, {"inv_freq", inv_freq}});
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t position = positions.as<int64_t>()[t];
    check_value(position >= 0, "positions[", t, "] is ", position, "; wanted 0 or more");
  }
  const auto write_token = [&](int64_t t) {
    const double position = static_cast<double>(positions.as<int64_t>()[t]);
    for (int64_t i = 0; i < half; ++i) {
      const double angle = position * inv_freq.as<double>()[i];
      cos.as<float>()[t * half + i] = static_cast<float>(std::cos(angle) * scaling);
      sin.as<float>()[t * half + i] = static_cast<float>(std::sin(angle) * scaling);
    }
  };
  if (num_tokens < 8) {
    for (int64_t t = 0; t < num_tokens; ++t) write_token(t);  // not worth waking a thread
  } else {
    parallel_for(num_tokens, write_token);
  }
}

void rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y) {
  check_rope(x, cos, sin, y);
  const int64_t num_tokens = x.shape[0], num_heads = x.shape[1], head_dim = x.shape[2];
  const RopeKernel kernel = table.pick();
  const int64_t x_row = x.stride[0] * dtype_size(x.dtype), y_row = y.stride[0] * dtype_size(y.dtype);
  parallel_for(num_tokens, [&](int64_t t) {
    kernel({x.as<char>() + t * x_row, x.dtype, y.as<char>() + t * y_row, y.dtype,
            cos.as<float>() + t * (head_dim / 2), sin.as<float>() + t * (head_dim / 2), num_heads, head_dim});
  });
}

}  // namespace mxmoe
