#if defined(MXMOE_X86_KERNELS)
#include "ops/expert_routing/expert_routing.h"

#include <cmath>

#include "simd/avx2.h"

#include "core/target_avx2.h"
namespace mxmoe {
namespace avx2 {
namespace {
#include "ops/expert_routing/expert_routing_kernel.inl"
}  // namespace
}  // namespace avx2

void expert_routing_avx2(const RoutingRow& row) { avx2::expert_routing_row(row); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
