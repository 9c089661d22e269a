// The floating-point settings of a thread: C++ leaves them to whoever calls, and results may not.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace mxmoe {

// While one lives, its thread rounds to nearest, keeps subnormals and traps nothing; then the settings it found come
// back. A library built with -ffast-math, or torch.set_flush_denormal, turns subnormals off for a thread and for all
// that it starts. Reading the register takes a few cycles; it is written only where something differs.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() noexcept : found_(read()) {
    if (differs()) write((found_ & ~kControl) | kDefault);
  }
  ~DefaultFloatEnvironment() {
    if (differs()) write(found_);
  }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
#if defined(__x86_64__) || defined(_M_X64)
  // MXCSR: bit 6 reads subnormals as zero, 7 to 12 mask the exceptions, 13 and 14 round, 15 writes zero for
  // subnormals. Bits 0 to 5 note what has happened, which is no setting.
  using Register = uint32_t;
  static constexpr Register kControl = 0xffc0, kDefault = 0x1f80;
  static Register read() noexcept { return _mm_getcsr(); }
  static void write(Register value) noexcept { _mm_setcsr(value); }
#elif defined(__aarch64__) && defined(__GNUC__)
  // FPCR holds settings alone, all of them 0 when a program starts.
  using Register = uint64_t;
  static constexpr Register kControl = ~Register{0}, kDefault = 0;
  static Register read() noexcept {
    Register value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void write(Register value) noexcept { __asm__ volatile("msr fpcr, %0" ::"r"(value) : "memory"); }
#else
  using Register = uint32_t;
  static constexpr Register kControl = 0, kDefault = 0;
  static Register read() noexcept { return 0; }
  static void write(Register) noexcept {}
#endif
  bool differs() const noexcept { return (found_ & kControl) != kDefault; }

  Register found_;
};

}  // namespace mxmoe
