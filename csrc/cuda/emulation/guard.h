// Memory that AddressSanitizer shall report when it is touched, such as the gaps between an arena's pieces.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mxmoe {
namespace emulation {

constexpr size_t kGuardBytes = 256;

inline void guard_memory(void* begin, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(begin, bytes);
#else
  (void)begin, (void)bytes;
#endif
}

inline void unguard_memory(void* begin, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(begin, bytes);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace emulation
}  // namespace mxmoe
