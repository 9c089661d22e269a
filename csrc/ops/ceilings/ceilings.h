// ceilings
// Computes: what this machine can do at most on the current threads, to measure the ops against: how fast memory
//           is read, and how fast the dot-product instruction of each activation format runs.
// Shapes:   read: a buffer of num_bytes, all of it, once a call. Arithmetic: kItems items of `rounds` rounds.
// Dtypes:   int8: unsigned by signed bytes, int32 sums. bf16: pairs of bfloat16, float32 sums, and where that is slow
//           or missing what is in its place: pairs of 16-bit integers, int32 sums (see simd/prepare_int16.inl), or
//           float32. float32: fused multiply and add.
// Layout:   the buffer lies on 2 MiB pages where the system gives them.
// Units:    seconds by the steady clock; an operation is one multiplication or one addition.
// Requires: num_bytes >= kMinReadBytes; rounds >= 1.
// Calls:    threads: chunks of the buffer and items of arithmetic go to whichever thread is free; what was read
//           and computed is folded into a value that is kept, so that no compiler drops it.
// Source:   McCalpin 1995 (STREAM), with reads only; Williams et al. 2009 (roofline), section 3.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace mxmoe {

constexpr int64_t kMinReadBytes = int64_t{1} << 20;

// Memory to be read again and again. Larger than every cache, or it measures the cache.
class ReadBuffer {
 public:
  explicit ReadBuffer(int64_t num_bytes);  // throws ValueError when the memory is not to be had
  ~ReadBuffer();
  ReadBuffer(const ReadBuffer&) = delete;
  ReadBuffer& operator=(const ReadBuffer&) = delete;
  int64_t size() const { return size_; }
  double read_seconds() const;

 private:
  int64_t size_;
  size_t mapped_ = 0;
  void* memory_ = nullptr;
  char* begin_ = nullptr;
};

struct PeakRun {
  double operations;
  double seconds;
};
PeakRun run_peak(Activations format, int64_t rounds);

// Folds n bytes, a multiple of kReadStep, into one word.
constexpr int64_t kReadStep = 512;
using ReadKernel = uint64_t (*)(const char* p, int64_t n);
uint64_t read_scalar(const char* p, int64_t n);
uint64_t read_avx2(const char* p, int64_t n);
uint64_t read_avx512(const char* p, int64_t n);

// `rounds` rounds of `operations` operations each, in chains long enough apart that none waits for another.
struct PeakKernel {
  int64_t operations;
  float (*run)(int64_t rounds);
};
extern const PeakKernel peak_int8_scalar, peak_int8_avx2, peak_int8_avxvnni, peak_int8_avx512, peak_int8_avx512vnni;
extern const PeakKernel peak_float32_scalar, peak_float32_avx2, peak_float32_avx512;
extern const PeakKernel peak_int16_avx2, peak_int16_avxvnni, peak_int16_avx512, peak_int16_avx512vnni;
extern const PeakKernel peak_bf16_avx512bf16;

}  // namespace mxmoe
