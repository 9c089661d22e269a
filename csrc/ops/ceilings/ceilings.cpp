#include "ops/ceilings/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>

#include "core/check.h"
#include "core/isa.h"
#include "core/thread_pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mxmoe {
namespace {

Dispatch<ReadKernel> read_table("ceilings_read",
                                {MXMOE_X86({"read_avx512", kAvx512, read_avx512}, {"read_avx2", kAvx2, read_avx2}){
                                    "read_scalar", 0, read_scalar}});

using Peak = const PeakKernel*;
Dispatch<Peak> int8_table("ceilings_int8", {MXMOE_X86({"peak_int8_avx512vnni", kAvx512VnniDot, &peak_int8_avx512vnni},
                                                      {"peak_int8_avx512", kAvx512, &peak_int8_avx512},
                                                      {"peak_int8_avxvnni", kAvx2 | kAvxVnni, &peak_int8_avxvnni},
                                                      {"peak_int8_avx2", kAvx2, &peak_int8_avx2}){
                                               "peak_int8_scalar", 0, &peak_int8_scalar}});
Dispatch<Peak> bf16_table("ceilings_bf16",
                          {MXMOE_X86({"peak_bf16_avx512bf16", kAvx512Bf16Dot, &peak_bf16_avx512bf16},
                                     {"peak_bf16_as_int16_avx512vnni", kAvx512VnniDot, &peak_int16_avx512vnni},
                                     {"peak_bf16_as_int16_avx512", kAvx512, &peak_int16_avx512},
                                     {"peak_bf16_as_int16_avxvnni", kAvx2 | kAvxVnni, &peak_int16_avxvnni},
                                     {"peak_bf16_as_int16_avx2", kAvx2, &peak_int16_avx2}){
                              "peak_bf16_as_float32_scalar", 0, &peak_float32_scalar}});
Dispatch<Peak> float32_table("ceilings_float32", {MXMOE_X86({"peak_float32_avx512", kAvx512, &peak_float32_avx512},
                                                            {"peak_float32_avx2", kAvx2, &peak_float32_avx2}){
                                                     "peak_float32_scalar", 0, &peak_float32_scalar}});

Peak pick_peak(Activations format) {
  if (format == Activations::i8) return int8_table.pick();
  return format == Activations::bf16 ? bf16_table.pick() : float32_table.pick();
}

// Where results go to die; an atomic, because every thread leaves one.
std::atomic<uint64_t> kept{0};

constexpr int64_t kHugePage = int64_t{1} << 21;
// A chunk is large beside the cost of handing it out, small beside a thread's share of the buffer.
constexpr int64_t kChunk = kHugePage;
// Items of arithmetic a thread: a thread that is held up leaves its share to the others.
constexpr int64_t kItemsPerThread = 8;

template <typename Body>
double seconds_of(const Body& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

ReadBuffer::ReadBuffer(int64_t num_bytes) : size_(num_bytes / kReadStep * kReadStep) {
  check_value(num_bytes >= kMinReadBytes, "num_bytes is ", num_bytes, "; wanted at least ", kMinReadBytes);
  check_value(num_bytes <= INT64_MAX - kHugePage, "num_bytes is ", num_bytes, "; wanted a size that fits in memory");
  mapped_ = static_cast<size_t>(size_ + kHugePage);
#if defined(__linux__)
  memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory_ == MAP_FAILED) memory_ = nullptr;
#else
  memory_ = ::operator new(mapped_, std::nothrow);
#endif
  check_value(memory_ != nullptr, "num_bytes is ", num_bytes, "; the system does not give that much memory");
  const auto address = reinterpret_cast<uintptr_t>(memory_);
  begin_ = static_cast<char*>(memory_) + (kHugePage - address % kHugePage) % kHugePage;
#if defined(__linux__)
  (void)madvise(begin_, static_cast<size_t>(size_), MADV_HUGEPAGE);  // a wish; refused, small pages are read
#endif
  // Written, because pages that never were are all one page of zeros, which stays in the cache.
  parallel_for((size_ + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t at = chunk * kChunk;
    std::memset(begin_ + at, static_cast<int>(chunk % 251) + 1, static_cast<size_t>(std::min(kChunk, size_ - at)));
  });
}

ReadBuffer::~ReadBuffer() {
#if defined(__linux__)
  munmap(memory_, mapped_);
#else
  ::operator delete(memory_);
#endif
}

double ReadBuffer::read_seconds() const {
  const ReadKernel kernel = read_table.pick();
  return seconds_of([&] {
    parallel_for((size_ + kChunk - 1) / kChunk, [&](int64_t chunk) {
      const int64_t at = chunk * kChunk;
      kept.fetch_xor(kernel(begin_ + at, std::min(kChunk, size_ - at)), std::memory_order_relaxed);
    });
  });
}

PeakRun run_peak(Activations format, int64_t rounds) {
  check_value(rounds >= 1 && rounds <= INT32_MAX, "rounds is ", rounds, "; wanted 1 to ", INT32_MAX);
  const PeakKernel& kernel = *pick_peak(format);
  const int64_t items = kItemsPerThread * current_num_threads();
  const double seconds = seconds_of([&] {
    parallel_for(items,
                 [&](int64_t) { kept.fetch_xor(bits_from_float(kernel.run(rounds)), std::memory_order_relaxed); });
  });
  return {static_cast<double>(items) * static_cast<double>(rounds) * static_cast<double>(kernel.operations), seconds};
}

}  // namespace mxmoe
