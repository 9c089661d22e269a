// One block of threads after the other, on one thread of the host.
//
// A block's threads are fibers. Each runs until it waits: at a barrier of the block, in a warp's collective, or for a
// phase of an mbarrier. In which order they run is drawn anew, from a seed, at every round, and for some rounds one
// warpgroup runs alone or one warp does not, so that what only some order makes right comes out wrong in others.
// Reported as errors: a barrier or collective that some threads never reach, lanes of one warp in different
// collectives, addresses that an instruction does not take. Dynamic shared memory is a heap block of exactly the size
// asked for, poisoned before every block; a destination of cp.async is poisoned until the wait.
//
// What this cannot judge: whether the documented lane layouts, from which its fragments are built, are those of the
// hardware; the order in which a tensor core adds; approximate instructions' last bits; races that no order of
// threads between two waiting points shows (it switches only there); memory ordering between blocks, which run
// one after the other, and blocks that wait for each other; shared-memory banks, coalescing and every other matter
// of speed; limits on registers and threads that only the hardware has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace mxmoe {
namespace emulation {

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// Runs `body` once for every thread. Returns what went wrong, or nothing.
std::string run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

void set_seed(uint64_t seed);  // of the orders; 0 runs threads and blocks by number

// From here on, called by kernels.
int lane();
size_t thread_number();
size_t shared_size();
bool coin();  // from the seed; for chances other than the order of threads
unsigned char* dynamic_shared();
void block_barrier();
void warp_barrier(unsigned mask);
// mbarrier: arrivals that a phase still wants, those of a whole one, and the number of the phase.
void phase_init(uint64_t* barrier, unsigned count);
void phase_arrive(uint64_t* barrier);
void phase_wait(uint64_t* barrier, unsigned parity);
// Ends the block with an error; does not return.
[[noreturn]] void fail(const std::string& what);

// Waits until every lane of the mask is in the same collective; then `compute` is called once, with the pointers
// that the lanes brought (null for lanes outside the mask).
using Compute = void (*)(const void* const (&in)[32], void* const (&out)[32]);
void warp_collective(const char* what, unsigned mask, const void* in, void* out, Compute compute);

// The same for a warpgroup: four warps from one whose number is divisible by 4.
using GroupCompute = void (*)(const void* const (&in)[128]);
void warpgroup_collective(const char* what, const void* in, GroupCompute compute);

template <typename T>
T shuffle(const char* what, unsigned mask, T value, int from) {
  struct In {
    T value;
    int from;
  } in{value, from};
  T out;
  warp_collective(what, mask, &in, &out, [](const void* const(&ins)[32], void* const(&outs)[32]) {
    for (int l = 0; l < 32; ++l) {
      if (ins[l] == nullptr) continue;
      const int source = static_cast<const In*>(ins[l])->from;
      // A lane outside the mask has no value to give; hardware would return anything.
      if (source < 0 || source > 31 || ins[source] == nullptr) fail("a shuffle reads a lane outside its mask");
      *static_cast<T*>(outs[l]) = static_cast<const In*>(ins[source])->value;
    }
  });
  return out;
}
unsigned ballot(unsigned mask, bool predicate);

// cp.async of the running thread.
void async_copy(void* shared, const void* global, size_t bytes, bool valid);
void async_commit();
void async_wait(int groups_left);
void check_shared(const void* p, size_t bytes, const char* what);

}  // namespace emulation
}  // namespace mxmoe
