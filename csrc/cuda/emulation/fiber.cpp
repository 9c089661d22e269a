#include "cuda/emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cuda/emulation/guard.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
namespace {
void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
}  // namespace
#endif

#if defined(__x86_64__)
// swapcontext asks the kernel for the signal mask at every switch, which is most of what the emulation would do.
extern "C" void mxmoe_switch_stack(void** save, void* load);
asm(R"(
.text
.globl mxmoe_switch_stack
.hidden mxmoe_switch_stack
.type mxmoe_switch_stack, @function
mxmoe_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mxmoe_switch_stack, .-mxmoe_switch_stack
)");
#endif

namespace mxmoe {
namespace emulation {
namespace {

// A sanitized kernel's frame takes a few KB; the lowest page is closed, so that an overrun stops there.
constexpr size_t kPage = 4096, kStackBytes = 128 * 1024;
Fiber* entered = nullptr;

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kStackBytes);
}

void Fiber::run() {
  Fiber& self = *entered;
  __sanitizer_finish_switch_fiber(nullptr, &self.outer_stack_, &self.outer_size_);
  self.function_();
  std::abort();
}

void Fiber::start(void (*function)()) {
  function_ = function;
  if (stack_ == nullptr) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
  }
  unguard_memory(stack_, kStackBytes);  // frames that were never left kept their red zones
  fake_stack_ = nullptr;
#if defined(__x86_64__)
  // What the switch pops: six registers, then the address that it returns to with the stack as after a call.
  auto* top = reinterpret_cast<uintptr_t*>(stack_ + kStackBytes) - 1;
  *--top = reinterpret_cast<uintptr_t>(&Fiber::run);
  for (int i = 0; i < 6; ++i) *--top = 0;
  inside_ = top;
#else
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_, inside_.uc_stack.ss_size = kStackBytes, inside_.uc_link = nullptr;
  makecontext(&inside_, &Fiber::run, 0);
#endif
}

void Fiber::enter() {
  entered = this;
  void* outer_fake = nullptr;
  __sanitizer_start_switch_fiber(&outer_fake, stack_, kStackBytes);
#if defined(__x86_64__)
  mxmoe_switch_stack(&outside_, inside_);
#else
  swapcontext(&outside_, &inside_);
#endif
  __sanitizer_finish_switch_fiber(outer_fake, nullptr, nullptr);
}

void Fiber::leave() {
  __sanitizer_start_switch_fiber(&fake_stack_, outer_stack_, outer_size_);
#if defined(__x86_64__)
  mxmoe_switch_stack(&inside_, outside_);
#else
  swapcontext(&inside_, &outside_);
#endif
  __sanitizer_finish_switch_fiber(fake_stack_, &outer_stack_, &outer_size_);
}

}  // namespace emulation
}  // namespace mxmoe
