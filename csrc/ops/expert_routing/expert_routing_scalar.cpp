#include "ops/expert_routing/expert_routing.h"

#include <cmath>

#include "simd/scalar.h"

namespace mxmoe {
namespace scalar {
namespace {
#include "ops/expert_routing/expert_routing_kernel.inl"
}  // namespace
}  // namespace scalar

void expert_routing_scalar(const RoutingRow& row) { scalar::expert_routing_row(row); }

}  // namespace mxmoe
