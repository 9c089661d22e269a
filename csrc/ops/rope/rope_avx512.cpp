#if defined(MXMOE_X86_KERNELS)
#include "ops/rope/rope.h"

#include <cmath>

#include "simd/avx512.h"

#include "core/target_avx512.h"
namespace mxmoe {
namespace avx512 {
namespace {
#include "ops/rope/rope_kernel.inl"
}  // namespace
}  // namespace avx512

void rope_avx512(const RopeToken& token) { avx512::rope_any(token); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
