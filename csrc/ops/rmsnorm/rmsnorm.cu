#include "ops/rmsnorm/rmsnorm.h"

#include "cuda/launch.h"
#include "ops/rmsnorm/rmsnorm_row.cuh"

namespace mxmoe {
namespace cuda {
namespace {

constexpr int kThreads = norm::kParts * kWarp;

struct Rows {
  const void* x;
  int64_t x_stride;
  const void* weight;
  void* y;
  int64_t y_stride;
  int64_t hidden_size;
  float eps;
};

template <typename X, typename W, typename Y>
__global__ void __launch_bounds__(kThreads) rmsnorm_sm80_kernel(Rows r) {
  float* partial = reinterpret_cast<float*>(ptx::dynamic_shared());
  const X* x = static_cast<const X*>(r.x) + blockIdx.x * r.x_stride;
  Y* y = static_cast<Y*>(r.y) + blockIdx.x * r.y_stride;
  const W* weight = static_cast<const W*>(r.weight);
  const int64_t n = r.hidden_size;
  const bool x_aligned = aligned_to(x, 4 * sizeof(X)), y_aligned = aligned_to(y, 4 * sizeof(Y));
  const bool weight_aligned = aligned_to(weight, 4 * sizeof(W));
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const float part = norm::part_of_squares(x, n, x_aligned, warp);
  if (threadIdx.x % kWarp == 0) partial[warp] = part;
  __syncthreads();
  const float inverse = norm::inverse_of(partial, n, r.eps);
  for (int64_t i = 4 * int64_t{threadIdx.x}; i < n; i += 4 * kThreads) {
    store4(y, i, n, y_aligned, norm::scaled(load4(x, i, n, x_aligned), inverse, load4(weight, i, n, weight_aligned)));
  }
}

using Kernel = void (*)(Rows);

template <typename X, typename W>
Kernel pick_y(DType y) {
  return y == DType::f32 ? rmsnorm_sm80_kernel<X, W, float> : rmsnorm_sm80_kernel<X, W, bf16>;
}
template <typename X>
Kernel pick_weight(DType weight, DType y) {
  return weight == DType::f32 ? pick_y<X, float>(y) : pick_y<X, bf16>(y);
}

}  // namespace

void rmsnorm(Stream& stream, const Tensor& x, const Tensor& weight, float eps, const Tensor& y) {
  check_rmsnorm(x, weight, eps, y);
  const Rows rows{x.data, x.stride[0], weight.data, y.data, y.stride[0], x.shape[1], eps};
  const Kernel kernel =
      x.dtype == DType::f32 ? pick_weight<float>(weight.dtype, y.dtype) : pick_weight<bf16>(weight.dtype, y.dtype);
  record_kernel("rmsnorm", "rmsnorm_sm80_kernel");
  launch(kernel, grid_size(x.shape[0]), kThreads, norm::kParts * sizeof(float), stream, Order::Dependent, rows);
}

}  // namespace cuda
}  // namespace mxmoe
