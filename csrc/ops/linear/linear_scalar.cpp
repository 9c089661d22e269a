#include "ops/linear/linear.h"

#include <cmath>

#include "simd/scalar.h"

namespace mxmoe {
namespace scalar {
namespace {
#include "ops/linear/linear_kernels.inl"
}  // namespace
}  // namespace scalar

const LinearKernels linear_scalar = scalar::kLinear;

}  // namespace mxmoe
