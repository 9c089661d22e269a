// Matrix products of a warpgroup, which run on their own, and what they see of shared memory.
//
// Accumulators hold NaN from the issue of a product to the wait for its group. A coin decides whether a product's
// operands are read when it is issued or when it is waited for, so that what is overwritten too early comes out wrong
// for some seeds. Products read a copy of shared memory; when a thread has called fence_proxy_async, the next barrier
// or product brings it up to date, but for what cp.async of other threads brought and they have not fenced. Bytes
// that are not as in the copy are read as NaN. Reported as errors: a group that does not begin with a fence, threads
// with different descriptors, tiles out of shared memory or not laid out as the instruction takes them, products that
// nobody waits for.
//
// What this cannot judge: which of several threads wrote something by plain stores and did not fence it; registers
// that were written between a group's fence and its product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace mxmoe {
namespace emulation {

// Of the block that starts or ends; the latter returns what is wrong.
void start_warpgroups(size_t num_threads, size_t shared_bytes);
std::string end_warpgroups();
// All threads of the block are at a barrier.
void shared_barrier();
// `thread` has waited for what its cp.async wrote.
void copied_to_shared(size_t thread, size_t offset, size_t bytes);

// From here on, called by kernels.
uint32_t shared_address(const void* p);
void fence_proxy_async();
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);

struct WarpgroupProduct {
  float* d;
  const uint32_t* a;  // registers; null: by descriptor
  uint64_t a_tile, b_tile;
  bool transposed_a, transposed_b, accumulate;
  int n;
};
void wgmma(const WarpgroupProduct& product);

}  // namespace emulation
}  // namespace mxmoe
