// CUDA graphs: a sequence of launches recorded once and replayed at the cost of one.
#pragma once

#include <memory>

#include "cuda/stream.h"

namespace mxmoe {
namespace cuda {

// What is launched on the stream between begin and end is recorded, not run. Kernels keep the addresses they got:
// every array must outlive the graph, and none can be allocated meanwhile.
class Graph {
 public:
  explicit Graph(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {}
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void begin();
  void end();
  void abandon();  // ends a capture that went wrong
  void replay();   // on the stream it was captured on
  size_t num_nodes() const { return num_nodes_; }
  // Edges along which a kernel may begin before the one ahead has ended.
  size_t num_overlaps() const { return num_overlaps_; }

 private:
  std::shared_ptr<Stream> stream_;
  cudaGraphExec_t executable_ = nullptr;
  bool capturing_ = false;
  size_t num_nodes_ = 0, num_overlaps_ = 0;
};

}  // namespace cuda
}  // namespace mxmoe
