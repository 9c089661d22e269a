// Number formats and small value types shared by every layer. No ISA-specific code.
#pragma once

#include <cstdint>
#include <cstring>

// For the innermost pieces of kernels, whose operands must stay in registers.
#if defined(_MSC_VER)
#define MXMOE_INLINE __forceinline
#define MXMOE_NOINLINE __declspec(noinline)
#else
#define MXMOE_INLINE inline __attribute__((always_inline))
#define MXMOE_NOINLINE __attribute__((noinline))
#endif

namespace mxmoe {

// Upper half of an IEEE float32. Conversions round to nearest, ties to even.
struct bf16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(bf16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(float value) { return value; }

inline bf16 to_bf16(float value) {
  uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN: keep it one after dropping the low half
    return bf16{static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  }
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// OCP Microscaling v1.0: a block is 32 values, 16 bytes of e2m1 codes and one e8m0 scale byte.
constexpr int kMxBlock = 32;
constexpr int kMxBlockBytes = kMxBlock / 2;

// e8m0: 2^(byte - 127); byte 255 is NaN. 2^-127 is subnormal in float32.
inline float e8m0_to_float(uint8_t byte) {
  if (byte == 255) return float_from_bits(0x7fc00000u);
  return float_from_bits(byte == 0 ? 0x00400000u : static_cast<uint32_t>(byte) << 23);
}

// e2m1 codes times two, so that they are integers; bit 3 is the sign.
constexpr int8_t kE2m1Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

enum class DType : uint8_t { f32, f64, bf16, i8, u8, i32, i64 };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f64:
      return "float64";
    case DType::bf16:
      return "bfloat16";
    case DType::i8:
      return "int8";
    case DType::u8:
      return "uint8";
    case DType::i32:
      return "int32";
    default:
      return "int64";
  }
}

inline int dtype_size(DType dtype) {
  switch (dtype) {
    case DType::i8:
    case DType::u8:
      return 1;
    case DType::bf16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    default:
      return 8;
  }
}

// How activations enter a dot product with quantised or bf16 weights.
enum class Activations : uint8_t { f32, bf16, i8 };

constexpr int kMaxDims = 4;

// A row-major array somebody else owns. Strides are in elements; the last one is always 1.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {0, 0, 0, 0};
  int64_t stride[kMaxDims] = {0, 0, 0, 0};

  explicit operator bool() const { return ndim > 0; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

}  // namespace mxmoe
