// One pool of worker threads for the whole process. Work is a counted list of independent items; which thread
// takes which item never changes a result.
#pragma once

#include <cstdint>
#include <functional>

namespace mxmoe {

// Calls body(item) for every item in [0, count), on at most current_num_threads() threads, the caller's own
// among them; returns when all are done. Exceptions must not leave `body`. Calls from several threads queue
// up.
void parallel_for(int64_t count, const std::function<void(int64_t)>& body);

// How many of `rows` weight rows make an item, a multiple of `step`: long runs of memory, yet some thirty items a
// thread to share out evenly.
int64_t tile_rows(int64_t rows, int64_t step);

int hardware_threads();       // CPUs this process may run on
int current_num_threads();    // for ops called from this thread
void set_num_threads(int n);  // for ops called from this thread; 0 returns to the default

}  // namespace mxmoe
