#include "ops/rope/rope.h"

#include <cmath>

#include "simd/scalar.h"

namespace mxmoe {
namespace scalar {
namespace {
#include "ops/rope/rope_kernel.inl"
}  // namespace
}  // namespace scalar

void rope_scalar(const RopeToken& token) { scalar::rope_any(token); }

}  // namespace mxmoe
