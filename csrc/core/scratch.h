// Working memory of an op: one growing block per calling thread, kept between calls so that a decode step
// allocates nothing. Sizes are checked against overflow before they reach the allocator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace mxmoe {

constexpr size_t kScratchAlign = 64;

// The product of non-negative factors; throws ValueError when it does not fit.
size_t checked_product(const char* what, std::initializer_list<int64_t> factors);

class Scratch {
 public:
  // Hands out 64-byte aligned pieces from the calling thread's block; valid until the next Scratch there.
  explicit Scratch(size_t total_bytes);
  template <typename T>
  T* take(size_t count) {
    return reinterpret_cast<T*>(take_bytes(count * sizeof(T)));
  }
  // What take<T>(count) uses up, to be summed for the constructor.
  template <typename T>
  static size_t bytes(size_t count) {
    return (count * sizeof(T) + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
  }

 private:
  unsigned char* take_bytes(size_t size);
  unsigned char* next_;
  unsigned char* end_;
};

}  // namespace mxmoe
