// A function with a stack of its own that can be left and entered again.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace mxmoe {
namespace emulation {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  void start(void (*function)());  // which must leave, never return; what ran before is dropped
  void enter();                    // from outside: until the function leaves
  void leave();                    // from inside

 private:
  static void run();
  char* stack_ = nullptr;
  void (*function_)() = nullptr;
#if defined(__x86_64__)
  void* inside_ = nullptr;  // stack pointers
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
  void* fake_stack_ = nullptr;  // the sanitizer's
  const void* outer_stack_ = nullptr;
  size_t outer_size_ = 0;
};

}  // namespace emulation
}  // namespace mxmoe
