#include "cuda/graph.h"

#include <vector>

#include "core/check.h"
#include "cuda/error.h"

namespace mxmoe {
namespace cuda {

Graph::~Graph() {
  if (capturing_) abandon();
  if (executable_ == nullptr) return;
  cudaStreamSynchronize(stream_->handle());  // it may be running
  cudaGraphExecDestroy(executable_);
}

namespace {

// For tests and for whoever measures: 0 where it cannot be told.
size_t count_overlaps(cudaGraph_t graph) {
  size_t edges = 0, overlaps = 0;
  if (cudaGraphGetEdges(graph, nullptr, nullptr, nullptr, &edges) == cudaSuccess && edges > 0) {
    std::vector<cudaGraphNode_t> from(edges), to(edges);
    std::vector<cudaGraphEdgeData> data(edges);
    if (cudaGraphGetEdges(graph, from.data(), to.data(), data.data(), &edges) == cudaSuccess) {
      for (const cudaGraphEdgeData& edge : data) overlaps += edge.type == cudaGraphDependencyTypeProgrammatic;
    }
  }
  cudaGetLastError();
  return overlaps;
}

}  // namespace

void Graph::begin() {
  check_value(!capturing_ && executable_ == nullptr, "the graph has been captured already; wanted a new one");
  const DeviceGuard guard(stream_->device());
  // Only this thread's forbidden calls break the capture: another may load a model meanwhile.
  MXMOE_CUDA(cudaStreamBeginCapture(stream_->handle(), cudaStreamCaptureModeThreadLocal));
  capturing_ = true;
}

void Graph::end() {
  check_value(capturing_, "the graph is not being captured; wanted begin first");
  const DeviceGuard guard(stream_->device());
  cudaGraph_t graph = nullptr;
  capturing_ = false;
  MXMOE_CUDA(cudaStreamEndCapture(stream_->handle(), &graph));
  const cudaError_t counted = cudaGraphGetNodes(graph, nullptr, &num_nodes_);
  num_overlaps_ = count_overlaps(graph);
  const cudaError_t made = cudaGraphInstantiate(&executable_, graph, 0);
  cudaGraphDestroy(graph);
  check(counted, "cudaGraphGetNodes");
  check(made, "cudaGraphInstantiate");
}

void Graph::abandon() {
  cudaGraph_t graph = nullptr;
  capturing_ = false;
  if (cudaStreamEndCapture(stream_->handle(), &graph) == cudaSuccess && graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();
}

void Graph::replay() {
  check_value(executable_ != nullptr, "the graph holds nothing; wanted a finished capture");
  const DeviceGuard guard(stream_->device());
  MXMOE_CUDA(cudaGraphLaunch(executable_, stream_->handle()));
}

}  // namespace cuda
}  // namespace mxmoe
