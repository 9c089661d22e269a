// Fetching ahead of reads that go through memory in order.
#pragma once

#include <cstdint>

#if defined(_MSC_VER) && defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace mxmoe {

// Asks for the cache line at p, which need not be readable: into the first level, or no further than the second. Not
// as intrinsics: GCC takes a function that only prefetches for one without effect and drops its calls.
inline void prefetch(const void* p) {
#if defined(__GNUC__) && defined(__x86_64__)
  __asm__ volatile("prefetcht0 (%0)" : : "r"(p));
#elif defined(_MSC_VER) && defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#else
  (void)p;  // portable code does without
#endif
}
inline void prefetch_second_level(const void* p) {
#if defined(__GNUC__) && defined(__x86_64__)
  __asm__ volatile("prefetcht1 (%0)" : : "r"(p));
#elif defined(_MSC_VER) && defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
#else
  (void)p;
#endif
}

// How far ahead, in bytes. The first-level cache of Intel's CPUs waits for fewer lines at a time than memory could
// send: there a line comes to the second level first, which waits for more.
struct FetchDistance {
  int64_t first_level;
  int64_t second_level;  // 0: not by itself
};
FetchDistance fetch_distance(int64_t usual);

// What will be read when the read at p has gone on by the distance.
inline void fetch_ahead(const char* p, const FetchDistance& distance) {
  prefetch(p + distance.first_level);
  if (distance.second_level != 0) prefetch_second_level(p + distance.second_level);
}

}  // namespace mxmoe
