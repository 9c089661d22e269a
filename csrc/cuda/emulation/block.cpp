#include "cuda/emulation/block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>

#include "core/check.h"
#include "cuda/emulation/fiber.h"
#include "cuda/emulation/guard.h"
#include "cuda/emulation/warpgroup.h"

namespace mxmoe {
namespace emulation {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
};

enum class State { Ready, Barrier, Collective, Phase, Done };

struct Thread {
  Fiber fiber;
  State state;
  uint3 index;
  const char* waits_in;
  const uint64_t* phase_of;                   // the mbarrier that it waits for
  std::deque<std::vector<AsyncCopy>> groups;  // committed, oldest first
  std::vector<AsyncCopy> open;
};

struct Collective {
  const char* what;
  unsigned mask, arrived;
  Compute compute;
  const void* in[32];
  void* out[32];
};

struct GroupCollective {
  const char* what = nullptr;  // none waits
  GroupCompute compute;
  size_t arrived;
  const void* in[128];
};

constexpr size_t kSharedAlign = 1024;
constexpr unsigned char kPoison = 0xFF;  // NaN in every float format, -1 in every integer

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::vector<Collective>> collectives;  // waiting, by warp
  std::vector<GroupCollective> group_collectives;    // by warpgroup
  size_t count = 0, current = 0;
  std::unique_ptr<unsigned char[]> shared;  // plain new: the sanitizer watches its ends
  unsigned char* shared_begin = nullptr;
  size_t shared_bytes = 0;
  std::string fault;
  const std::function<void()>* body = nullptr;
};

Block the_block;
uint64_t the_seed = 0;
std::mt19937_64 the_coins;

Thread& running() { return *the_block.threads[the_block.current]; }

std::string describe(const Thread& thread) {
  return concat("thread (", thread.index.x, ", ", thread.index.y, ", ", thread.index.z, ") of block (", block_index.x,
                ", ", block_index.y, ", ", block_index.z, ")");
}

void yield_as(State state, const char* waits_in) {
  Thread& thread = running();
  thread.state = state, thread.waits_in = waits_in;
  thread.fiber.leave();
}

void thread_main() {
  (*the_block.body)();
  yield_as(State::Done, "");
}

// All threads wait at the barrier, or none may.
bool release_barrier() {
  Block& block = the_block;
  size_t waiting = 0;
  for (size_t i = 0; i < block.count; ++i) waiting += block.threads[i]->state == State::Barrier;
  if (waiting != block.count) return false;
  shared_barrier();
  for (size_t i = 0; i < block.count; ++i) block.threads[i]->state = State::Ready;
  return true;
}

std::string deadlock() {
  const Thread *stuck = nullptr, *other = nullptr;
  for (size_t i = 0; i < the_block.count; ++i) {
    const Thread& thread = *the_block.threads[i];
    if (stuck == nullptr && thread.state != State::Done) stuck = &thread;
  }
  for (size_t i = 0; i < the_block.count && stuck != nullptr; ++i) {
    const Thread& thread = *the_block.threads[i];
    if (thread.state != State::Done && std::strcmp(thread.waits_in, stuck->waits_in) == 0) continue;
    if (other == nullptr) other = &thread;
  }
  std::string text = concat(describe(*stuck), " waits in ", stuck->waits_in, " for threads that never come");
  if (other != nullptr) {
    text += other->state == State::Done ? concat("; ", describe(*other), " has ended")
                                        : concat("; ", describe(*other), " waits in ", other->waits_in);
  }
  return text;
}

// Who runs in a round: all; or, for some rounds, only the first warpgroup, in an order, that can, so that they drift
// apart; or all but one warp, as long as others can, so that it is late.
class Turns {
 public:
  explicit Turns(size_t threads) : order_((threads + kGroup - 1) / kGroup) {
    std::iota(order_.begin(), order_.end(), size_t{0});
  }
  void draw(std::mt19937_64& random) {
    begin_ = late_ = 0, end_ = the_block.count, late_end_ = 0;
    if (the_seed == 0) return;
    if (rounds_ == 0) {
      std::shuffle(order_.begin(), order_.end(), random);
      rounds_ = 1 + random() % kMostRounds, mode_ = random() % 4, warp_ = random() % ((end_ + kWarp - 1) / kWarp);
    }
    --rounds_;
    if (mode_ == 0) choose_group();
    if (mode_ == 1 && (can_run(0, kWarp * warp_) || can_run(kWarp * (warp_ + 1), end_))) {
      late_ = kWarp * warp_, late_end_ = late_ + kWarp;
    }
  }
  bool runs(size_t thread) const {
    return thread >= begin_ && thread < end_ && !(thread >= late_ && thread < late_end_);
  }

 private:
  static constexpr size_t kMostRounds = 256, kGroup = 128, kWarp = 32;
  static bool can_run(size_t begin, size_t end) {
    for (size_t i = begin; i < std::min(end, the_block.count); ++i) {
      if (the_block.threads[i]->state == State::Ready) return true;
    }
    return false;
  }
  void choose_group() {
    for (const size_t group : order_) {
      if (!can_run(kGroup * group, kGroup * (group + 1))) continue;
      begin_ = kGroup * group, end_ = begin_ + kGroup;
      return;
    }
  }
  std::vector<size_t> order_;
  size_t rounds_ = 0, mode_ = 0, warp_ = 0, begin_ = 0, end_ = 0, late_ = 0, late_end_ = 0;
};

void run_block(std::mt19937_64& random) {
  Block& block = the_block;
  std::vector<size_t> order(block.count);
  std::iota(order.begin(), order.end(), size_t{0});
  Turns turns(block.count);
  for (;;) {
    if (the_seed != 0) std::shuffle(order.begin(), order.end(), random);
    turns.draw(random);
    bool ran = false, all_done = true;
    for (const size_t i : order) {
      Thread& thread = *block.threads[i];
      if (thread.state == State::Ready && turns.runs(i)) {
        ran = true;
        block.current = i;
        thread_index = thread.index;
        thread.fiber.enter();
        if (!block.fault.empty()) return;
      }
      all_done = all_done && thread.state == State::Done;
    }
    if (all_done) {
      block.fault = end_warpgroups();
      return;
    }
    if (!ran && !release_barrier()) {
      block.fault = deadlock();
      return;
    }
  }
}

void start_block(size_t shared_bytes) {
  Block& block = the_block;
  // new aligns to 16; kernels may rely on 1024, as on the device. What is left over is closed.
  block.shared.reset(new unsigned char[shared_bytes + kSharedAlign]);
  unsigned char* memory = block.shared.get();
  unsigned char* begin = memory + (kSharedAlign - reinterpret_cast<uintptr_t>(memory) % kSharedAlign) % kSharedAlign;
  guard_memory(memory, shared_bytes + kSharedAlign);
  unguard_memory(begin, shared_bytes);
  std::memset(begin, kPoison, shared_bytes);
  block.shared_begin = begin, block.shared_bytes = shared_bytes;
  block.collectives.assign((block.count + 31) / 32, {});
  block.group_collectives.assign((block.count + 127) / 128, {});
  start_warpgroups(block.count, shared_bytes);
  block.fault.clear();
  for (size_t i = 0; i < block.count; ++i) {
    Thread& thread = *block.threads[i];
    thread.state = State::Ready, thread.waits_in = "";
    const auto n = static_cast<unsigned>(i);
    thread.index = {n % block_size.x, n / block_size.x % block_size.y, n / block_size.x / block_size.y};
    thread.groups.clear(), thread.open.clear();
    thread.fiber.start(thread_main);
  }
}

}  // namespace

void set_seed(uint64_t seed) { the_seed = seed; }

std::string run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  block_size = block, grid_size = grid;
  the_block.body = &body;
  the_block.count = size_t{block.x} * block.y * block.z;
  while (the_block.threads.size() < the_block.count) the_block.threads.push_back(std::make_unique<Thread>());
  std::mt19937_64 random(the_seed);
  the_coins.seed(the_seed);
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (the_seed != 0) std::shuffle(order.begin(), order.end(), random);
  for (const uint64_t b : order) {
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    start_block(shared_bytes);
    run_block(random);
    unguard_memory(the_block.shared.get(), shared_bytes + kSharedAlign);
    if (!the_block.fault.empty()) return the_block.fault;
  }
  return {};
}

int lane() { return static_cast<int>(the_block.current % 32); }
size_t thread_number() { return the_block.current; }
unsigned char* dynamic_shared() { return the_block.shared_begin; }
size_t shared_size() { return the_block.shared_bytes; }
bool coin() { return the_seed != 0 && (the_coins() & 1u) != 0; }

void fail(const std::string& what) {
  the_block.fault = concat(describe(running()), ": ", what);
  running().state = State::Done;
  running().fiber.leave();
  std::abort();  // a failed thread is never entered again
}

void block_barrier() { yield_as(State::Barrier, "__syncthreads"); }

namespace {

struct PhaseState {
  uint16_t wanted, whole;
  uint32_t phase;
};

PhaseState* phase_state(uint64_t* barrier, const char* what) {
  check_shared(barrier, sizeof *barrier, what);
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail(concat(what, " with an address not aligned to 8 bytes"));
  return reinterpret_cast<PhaseState*>(barrier);
}
PhaseState* begun_phase(uint64_t* barrier, const char* what) {
  PhaseState* state = phase_state(barrier, what);
  constexpr uint16_t kNone = kPoison << 8 | kPoison;
  if (state->whole == kNone || state->whole == 0) fail(concat(what, " on what nobody has initialised"));
  return state;
}

}  // namespace

void phase_init(uint64_t* barrier, unsigned count) {
  *phase_state(barrier, "mbarrier.init") = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
}

void phase_arrive(uint64_t* barrier) {
  PhaseState* state = begun_phase(barrier, "mbarrier.arrive");
  const bool ends = --state->wanted == 0;
  if (ends) state->wanted = state->whole, ++state->phase;
  for (size_t i = 0; i < the_block.count && ends; ++i) {
    Thread& thread = *the_block.threads[i];
    if (thread.state == State::Phase && thread.phase_of == barrier) thread.state = State::Ready;
  }
  if (coin()) yield_as(State::Ready, "");  // what others now do may come before this thread's next step
}

// Looks again when it runs again: a phase that began meanwhile and has the same parity is waited for, as on a device.
void phase_wait(uint64_t* barrier, unsigned parity) {
  const PhaseState* state = begun_phase(barrier, "mbarrier.try_wait");
  while ((state->phase & 1u) == parity) {
    running().phase_of = barrier;
    yield_as(State::Phase, "mbarrier.try_wait");
  }
}

void warp_collective(const char* what, unsigned mask, const void* in, void* out, Compute compute) {
  const size_t warp = the_block.current / 32;
  const int own = lane();
  if ((mask >> own & 1u) == 0) fail(concat(what, " with a mask that leaves the calling lane out"));
  // A warp's tail past the block's size does not exist and cannot be in a mask, except in the usual mask of all.
  const size_t lanes = std::min<size_t>(32, the_block.count - warp * 32);
  if (lanes < 32) mask &= (1u << lanes) - 1u;
  auto& waiting = the_block.collectives[warp];
  auto found =
      std::find_if(waiting.begin(), waiting.end(), [&](const Collective& c) { return (c.mask & mask) != 0; });
  if (found == waiting.end()) {
    waiting.push_back({what, mask, 0, compute, {}, {}});
    found = waiting.end() - 1;
  }
  const bool same = found->what == what || std::strcmp(found->what, what) == 0;
  if (found->mask != mask || found->compute != compute || !same) {
    fail(concat("lanes of one warp are in different collectives: ", what, " and ", found->what));
  }
  found->in[own] = in, found->out[own] = out;
  found->arrived |= 1u << own;
  if (found->arrived != mask) return yield_as(State::Collective, what);
  const Collective whole = *found;
  waiting.erase(found);
  whole.compute(whole.in, whole.out);
  for (size_t l = 0; l < lanes; ++l) {
    Thread& thread = *the_block.threads[warp * 32 + l];
    if ((mask >> l & 1u) != 0 && thread.state == State::Collective) thread.state = State::Ready;
  }
}

void warpgroup_collective(const char* what, const void* in, GroupCompute compute) {
  const size_t group = the_block.current / 128, own = the_block.current % 128;
  GroupCollective& waiting = the_block.group_collectives[group];
  if (waiting.what == nullptr) waiting = {what, compute, 0, {}};
  if (waiting.compute != compute) {
    fail(concat("threads of one warpgroup are in different collectives: ", what, " and ", waiting.what));
  }
  waiting.in[own] = in;
  if (++waiting.arrived < 128) return yield_as(State::Collective, what);
  const GroupCollective whole = waiting;
  waiting.what = nullptr;
  whole.compute(whole.in);
  for (size_t i = 0; i < 128; ++i) {
    Thread& thread = *the_block.threads[group * 128 + i];
    if (thread.state == State::Collective) thread.state = State::Ready;
  }
}

void warp_barrier(unsigned mask) {
  warp_collective("__syncwarp", mask, &mask, &mask, [](const void* const(&)[32], void* const(&)[32]) {});
}

unsigned ballot(unsigned mask, bool predicate) {
  unsigned votes = 0;
  warp_collective("__ballot_sync", mask, &predicate, &votes, [](const void* const(&in)[32], void* const(&out)[32]) {
    unsigned bits = 0;
    for (int l = 0; l < 32; ++l) {
      if (in[l] != nullptr && *static_cast<const bool*>(in[l])) bits |= 1u << l;
    }
    for (void* o : out) {
      if (o != nullptr) *static_cast<unsigned*>(o) = bits;
    }
  });
  return votes;
}

void check_shared(const void* p, size_t bytes, const char* what) {
  const auto* at = static_cast<const unsigned char*>(p);
  const unsigned char* end = the_block.shared_begin + the_block.shared_bytes;
  if (at < the_block.shared_begin || at + bytes > end) fail(concat(what, " with an address outside shared memory"));
}

void async_copy(void* shared, const void* global, size_t bytes, bool valid) {
  check_shared(shared, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % bytes != 0)) {
    fail(concat("cp.async with an address that is not aligned to ", bytes, " bytes"));
  }
  std::memset(shared, kPoison, bytes);
  running().open.push_back({shared, global, bytes, valid});
}

void async_commit() {
  running().groups.push_back(std::move(running().open));
  running().open.clear();
}

void async_wait(int groups_left) {
  auto& groups = running().groups;
  while (groups.size() > static_cast<size_t>(groups_left)) {
    for (const AsyncCopy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
      copied_to_shared(the_block.current,
                       static_cast<size_t>(static_cast<unsigned char*>(copy.to) - the_block.shared_begin),
                       copy.bytes);
    }
    groups.pop_front();
  }
}

}  // namespace emulation
}  // namespace mxmoe
