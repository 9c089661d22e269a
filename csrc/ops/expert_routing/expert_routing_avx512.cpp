#if defined(MXMOE_X86_KERNELS)
#include "ops/expert_routing/expert_routing.h"

#include <cmath>

#include "simd/avx512.h"

#include "core/target_avx512.h"
namespace mxmoe {
namespace avx512 {
namespace {
#include "ops/expert_routing/expert_routing_kernel.inl"
}  // namespace
}  // namespace avx512

void expert_routing_avx512(const RoutingRow& row) { avx512::expert_routing_row(row); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
