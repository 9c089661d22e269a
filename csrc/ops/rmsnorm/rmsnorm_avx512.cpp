#if defined(MXMOE_X86_KERNELS)
#include "ops/rmsnorm/rmsnorm.h"

#include <cmath>

#include "simd/avx512.h"

#include "core/target_avx512.h"
namespace mxmoe {
namespace avx512 {
namespace {
#include "ops/rmsnorm/rmsnorm_kernel.inl"
}  // namespace
}  // namespace avx512

void rmsnorm_avx512(const RmsnormRow& row) { avx512::rmsnorm_any(row); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
