#include "cuda/graph.h"

#include "core/check.h"
#include "cuda/error.h"

namespace mxmoe {
namespace cuda {

Graph::~Graph() {
  if (capturing_) abandon();
  if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
}

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
