#include "ops/rmsnorm/rmsnorm.h"

#include <cmath>

#include "simd/scalar.h"

namespace mxmoe {
namespace scalar {
namespace {
#include "ops/rmsnorm/rmsnorm_kernel.inl"
}  // namespace
}  // namespace scalar

void rmsnorm_scalar(const RmsnormRow& row) { scalar::rmsnorm_any(row); }

}  // namespace mxmoe
