// Calls of ops, kept to be made again without Python between them.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <utility>
#include <vector>

#include "bindings/bind.h"

namespace mxmoe {

// An op holds its arguments, and with them the arrays: made and destroyed with the GIL.
class Recording {
 public:
  using Op = std::function<void()>;

  void add(Op op) { ops_.push_back(std::move(op)); }
  size_t size() const { return ops_.size(); }
  // Runs all ops in order on what their arrays hold now. The GIL is taken back now and then, so that signals are
  // seen.
  void replay() const;

  // The one that ops called from this thread go into, or null.
  static Recording* current();
  void begin();
  void end();

 private:
  std::vector<Op> ops_;
};

// Runs an op, called with the GIL, without it. `op` owns what it needs, and narrows Python's numbers itself: here
// that rounds as it should.
template <class Op>
void run_op(Op op) {
  {
    const Unlocked unlocked;
    op();
  }
  if (Recording* recording = Recording::current()) recording->add(std::move(op));
}

}  // namespace mxmoe
