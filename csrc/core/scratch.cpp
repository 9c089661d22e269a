#include "core/scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "core/check.h"

namespace mxmoe {
namespace {
struct Free {
  void operator()(unsigned char* memory) const { std::free(memory); }
};
struct Block {
  std::unique_ptr<unsigned char[], Free> memory;
  size_t size = 0;
};
thread_local Block block;

// Rows of a prefill are megabytes, read in an order of their own: on huge pages, where the system has them.
constexpr size_t kHugePage = size_t{2} << 20;

unsigned char* allocate(size_t bytes) {
  const size_t align = bytes < kHugePage ? kScratchAlign : kHugePage;
  const size_t rounded = (bytes + align - 1) / align * align;
  void* memory = std::aligned_alloc(align, rounded);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (align == kHugePage) (void)madvise(memory, rounded, MADV_HUGEPAGE);  // a wish
#endif
  return static_cast<unsigned char*>(memory);
}
}  // namespace

size_t checked_product(const char* what, std::initializer_list<int64_t> factors) {
  constexpr uint64_t kLimit = uint64_t{1} << 47;  // more than any address space holds
  uint64_t product = 1;
  for (int64_t factor : factors) {
    const auto f = static_cast<uint64_t>(factor);
    check_value(factor >= 0 && (f == 0 || product <= kLimit / f), what,
                " would take more memory than can be addressed");
    product *= f;
  }
  return static_cast<size_t>(product);
}

Scratch::Scratch(size_t total_bytes) {
  if (block.size < total_bytes) {
    block.memory.reset();
    block.size = 0;
    block.memory.reset(allocate(total_bytes));
    block.size = total_bytes;
  }
  next_ = block.memory.get();
  end_ = next_ + block.size;
}

unsigned char* Scratch::take_bytes(size_t size) {
  const size_t rounded = (size + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
  if (rounded > static_cast<size_t>(end_ - next_)) throw std::bad_alloc();  // a sum in the op is wrong
  unsigned char* piece = next_;
  next_ += rounded;
  return piece;
}

}  // namespace mxmoe
