#if defined(MXMOE_X86_KERNELS)
#include "ops/rmsnorm/rmsnorm.h"

#include <cmath>

#include "simd/avx2.h"

#include "core/target_avx2.h"
namespace mxmoe {
namespace avx2 {
namespace {
#include "ops/rmsnorm/rmsnorm_kernel.inl"
}  // namespace
}  // namespace avx2

void rmsnorm_avx2(const RmsnormRow& row) { avx2::rmsnorm_any(row); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
