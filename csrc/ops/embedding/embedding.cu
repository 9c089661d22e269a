#include "ops/embedding/embedding.h"

#include "cuda/launch.h"
#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerBlock = 4 * kThreads;

template <typename W>
__global__ void __launch_bounds__(kThreads)
    embedding_sm80_kernel(const int64_t* token_ids, const W* weight, int64_t weight_stride, int64_t vocab_size,
                          int64_t hidden_size, float* y, int64_t y_stride) {
  const int64_t i = blockIdx.y * kPerBlock + 4 * int64_t{threadIdx.x};
  ptx::release_next_kernel();
  if (i >= hidden_size) return;
  ptx::wait_for_previous_kernel();
  const int64_t id = token_ids[blockIdx.x];
  float* out = y + blockIdx.x * y_stride;
  float4 v = make_float4(quiet_nan(), quiet_nan(), quiet_nan(), quiet_nan());
  if (id >= 0 && id < vocab_size) {
    const W* row = weight + id * weight_stride;
    v = load4(row, i, hidden_size, aligned_to(row, 4 * sizeof(W)));
  }
  store4(out, i, hidden_size, aligned_to(out, 16), v);
}

}  // namespace

void embedding(Stream& stream, const Tensor& token_ids, const Tensor& weight, const Tensor& y) {
  check_embedding(token_ids, weight, y);
  const int64_t hidden_size = weight.shape[1];
  const dim3 grid(grid_size(token_ids.shape[0]), grid_depth(ceil_div(hidden_size, kPerBlock)));
  record_kernel("embedding", "embedding_sm80_kernel");
  const auto* ids = token_ids.as<int64_t>();
  if (weight.dtype == DType::f32) {
    launch(embedding_sm80_kernel<float>, grid, kThreads, 0, stream, Order::Dependent, ids, weight.as<float>(),
           weight.stride[0], weight.shape[0], hidden_size, y.as<float>(), y.stride[0]);
  } else {
    launch(embedding_sm80_kernel<bf16>, grid, kThreads, 0, stream, Order::Dependent, ids, weight.as<bf16>(),
           weight.stride[0], weight.shape[0], hidden_size, y.as<float>(), y.stride[0]);
  }
}

}  // namespace cuda
}  // namespace mxmoe
