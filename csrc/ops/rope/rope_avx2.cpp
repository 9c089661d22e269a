#if defined(MXMOE_X86_KERNELS)
#include "ops/rope/rope.h"

#include <cmath>

#include "simd/avx2.h"

#include "core/target_avx2.h"
namespace mxmoe {
namespace avx2 {
namespace {
#include "ops/rope/rope_kernel.inl"
}  // namespace
}  // namespace avx2

void rope_avx2(const RopeToken& token) { avx2::rope_any(token); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
