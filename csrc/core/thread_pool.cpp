#include "core/thread_pool.h"

#include <atomic>
#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/check.h"
#include "core/float_environment.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace mxmoe {
namespace {

constexpr int kMaxThreads = 1024;
// Between the ops of a layer up to some hundred microseconds pass, with everything but the weights out of the caches;
// a worker spins that long before it parks, as waking up takes about as long again.
constexpr int kSpinRounds = 8000;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// The job of the moment, in one word: how many workers are at it, whether more may join, how many threads it is for
// (the caller's own among them), and its number, so that a worker knows a new one.
struct JobState {
  static constexpr uint64_t kOne = 1, kOpen = uint64_t{1} << 16;
  static int busy(uint64_t s) { return static_cast<int>(s & 0xffff); }
  static bool open(uint64_t s) { return (s & kOpen) != 0; }
  static int threads(uint64_t s) { return static_cast<int>(s >> 17 & 0x7fff); }
  static uint32_t number(uint64_t s) { return static_cast<uint32_t>(s >> 32); }
  static uint64_t opened(uint32_t number, int threads) {
    return uint64_t{number} << 32 | static_cast<uint64_t>(threads) << 17 | kOpen;
  }
};

// What is left of one thread's run of items: the owner takes from the front, so that it goes straight on through
// memory; who has nothing left takes from the back of another's. Both ends change at once.
class alignas(64) Share {
 public:
  void set(uint32_t begin, uint32_t end) { ends_.store(join(begin, end), std::memory_order_relaxed); }
  // The item taken, or -1 when none is left.
  int64_t take(bool front) {
    uint64_t ends = ends_.load(std::memory_order_relaxed);
    for (;;) {
      const auto begin = static_cast<uint32_t>(ends), end = static_cast<uint32_t>(ends >> 32);
      if (begin >= end) return -1;
      const uint64_t rest = front ? join(begin + 1, end) : join(begin, end - 1);
      if (ends_.compare_exchange_weak(ends, rest, std::memory_order_relaxed)) return front ? begin : end - 1;
    }
  }

 private:
  static uint64_t join(uint32_t begin, uint32_t end) { return static_cast<uint64_t>(end) << 32 | begin; }
  std::atomic<uint64_t> ends_{0};
};

class Pool {
 public:
  // At most UINT32_MAX items.
  void run(int threads, int64_t count, const std::function<void(int64_t)>& body) {
    const std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
    threads = static_cast<int>(std::min<int64_t>(threads, count));
    grow(threads - 1);
    // No worker is at a job now, nor can one join before the next is opened: all this is the caller's.
    body_ = &body;
    for (int64_t i = 0; i < threads; ++i) {
      shares_[i].set(static_cast<uint32_t>(count * i / threads), static_cast<uint32_t>(count * (i + 1) / threads));
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      state_.store(JobState::opened(JobState::number(state_.load(std::memory_order_relaxed)) + 1, threads),
                   std::memory_order_release);
    }
    if (parked_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    work(0, threads);
    // Everything is taken. A worker that has not come yet, asleep or without a CPU, is not waited for.
    state_.fetch_and(~JobState::kOpen, std::memory_order_relaxed);
    for (int spins = 0; JobState::busy(state_.load(std::memory_order_acquire)) > 0; ++spins) {
      if (spins < kSpinRounds) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void grow(int helpers) {
    while (static_cast<int>(workers_.size()) < helpers) {
      const int index = static_cast<int>(workers_.size());
      const uint32_t seen = JobState::number(state_.load(std::memory_order_relaxed));
      workers_.emplace_back([this, index, seen] { loop(index, seen); });
      workers_.back().detach();
    }
  }

  void work(int own, int threads) {
    for (int i = 0; i < threads; ++i) {
      Share& share = shares_[(own + i) % threads];
      for (int64_t item = share.take(i == 0); item >= 0; item = share.take(i == 0)) (*body_)(item);
    }
  }

  void loop(int index, uint32_t seen) {
    const DefaultFloatEnvironment environment;  // else the settings of the thread that happened to start this one
    for (;;) {
      uint64_t state = wait_past(seen);
      seen = JobState::number(state);
      bool joined = false;
      while (!joined && JobState::open(state) && JobState::number(state) == seen &&
             index + 1 < JobState::threads(state)) {
        joined = state_.compare_exchange_weak(state, state + JobState::kOne, std::memory_order_acquire,
                                              std::memory_order_relaxed);
      }
      if (!joined) continue;
      work(index + 1, JobState::threads(state));
      state_.fetch_sub(JobState::kOne, std::memory_order_release);
    }
  }

  // Returns the state once it is of another job.
  uint64_t wait_past(uint32_t seen) {
    const auto is_new = [&](uint64_t state) { return JobState::number(state) != seen; };
    for (int spins = 0; spins < kSpinRounds; ++spins) {
      const uint64_t state = state_.load(std::memory_order_relaxed);
      if (is_new(state)) return state;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    parked_.fetch_add(1, std::memory_order_relaxed);
    wake_.wait(lock, [&] { return is_new(state_.load(std::memory_order_relaxed)); });
    parked_.fetch_sub(1, std::memory_order_relaxed);
    return state_.load(std::memory_order_relaxed);
  }

  std::mutex run_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* body_ = nullptr;
  Share shares_[kMaxThreads];
  alignas(64) std::atomic<uint64_t> state_{0};
  std::atomic<int> parked_{0};
};

// Never destroyed: detached workers may outlive static destructors.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    static std::mutex creating;
    const std::lock_guard<std::mutex> lock(creating);
    current = pool.load(std::memory_order_acquire);
    if (current == nullptr) {
      current = new Pool;
      pool.store(current, std::memory_order_release);
#if defined(__unix__) || defined(__APPLE__)
      // A forked child has none of the workers: it starts a pool of its own when it needs one.
      static const int registered =
          pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); });
      (void)registered;
#endif
    }
  }
  return *current;
}

thread_local int requested_threads = 0;

}  // namespace

int hardware_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int current_num_threads() { return requested_threads > 0 ? requested_threads : hardware_threads(); }

void set_num_threads(int n) {
  check_value(n >= 0 && n <= kMaxThreads, "num_threads is ", n, "; wanted 0 (the default) to ", kMaxThreads);
  requested_threads = n;
}

int64_t tile_rows(int64_t rows, int64_t step) {
  constexpr int64_t kMost = 128;
  const int64_t even = rows / (32 * current_num_threads());
  return std::max(std::min(even, kMost) / step * step, step);
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  const int threads = count > 1 ? current_num_threads() : 1;
  if (threads == 1) {
    for (int64_t item = 0; item < count; ++item) body(item);
    return;
  }
  constexpr int64_t kMost = UINT32_MAX;
  if (count <= kMost) return the_pool().run(threads, count, body);
  for (int64_t begin = 0; begin < count; begin += kMost) {
    the_pool().run(threads, std::min(kMost, count - begin), [&](int64_t item) { body(begin + item); });
  }
}

}  // namespace mxmoe
