#include "core/scratch.h"

#include <memory>
#include <new>

#include "core/check.h"

namespace mxmoe {
namespace {
struct Block {
  std::unique_ptr<unsigned char[]> memory;
  size_t size = 0;
};
thread_local Block block;
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
  const size_t wanted = total_bytes + kScratchAlign;
  if (block.size < wanted) {
    block.memory.reset();
    block.size = 0;
    block.memory.reset(new unsigned char[wanted]);
    block.size = wanted;
  }
  const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
  next_ = block.memory.get() + (kScratchAlign - address % kScratchAlign) % kScratchAlign;
  end_ = block.memory.get() + block.size;
}

unsigned char* Scratch::take_bytes(size_t size) {
  const size_t rounded = (size + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
  if (rounded > static_cast<size_t>(end_ - next_)) throw std::bad_alloc();  // a sum in the op is wrong
  unsigned char* piece = next_;
  next_ += rounded;
  return piece;
}

}  // namespace mxmoe
