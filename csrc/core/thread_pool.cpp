#include "core/thread_pool.h"

#include <atomic>
#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/check.h"

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

struct Job {
  const std::function<void(int64_t)>* body = nullptr;
  int threads = 0;  // the caller's own among them
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
    const int helpers = threads - 1;
    grow(helpers);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = Job{&body, threads};
      for (int64_t i = 0; i < threads; ++i) {
        shares_[i].set(static_cast<uint32_t>(count * i / threads), static_cast<uint32_t>(count * (i + 1) / threads));
      }
      busy_.store(helpers, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (parked_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    work(0);
    for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins) {
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
      const uint64_t seen = generation_.load(std::memory_order_relaxed);
      workers_.emplace_back([this, index, seen] { loop(index, seen); });
      workers_.back().detach();
    }
  }

  void work(int own) {
    for (int i = 0; i < job_.threads; ++i) {
      Share& share = shares_[(own + i) % job_.threads];
      for (int64_t item = share.take(i == 0); item >= 0; item = share.take(i == 0)) (*job_.body)(item);
    }
  }

  void loop(int index, uint64_t seen) {
    for (;;) {
      wait_past(seen);
      // run() waits for every invited worker before it writes the next job, so job_ is stable for those; the
      // others must not look at it, or they would race with the next run().
      uint64_t current;
      bool invited;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        current = generation_.load(std::memory_order_relaxed);
        invited = index + 1 < job_.threads;
      }
      seen = current;
      if (!invited) continue;
      work(index + 1);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_past(uint64_t seen) {
    for (int spins = 0; spins < kSpinRounds; ++spins) {
      if (generation_.load(std::memory_order_acquire) != seen) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    parked_.fetch_add(1, std::memory_order_relaxed);
    wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
    parked_.fetch_sub(1, std::memory_order_relaxed);
  }

  std::mutex run_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  Job job_;
  Share shares_[kMaxThreads];
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> busy_{0};
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
