#if defined(MXMOE_X86_KERNELS)
#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <cmath>

#include "simd/avx512x.h"

#include "core/target_avx512x.h"
namespace mxmoe {
namespace avx512x {
namespace {
#include "ops/mxfp4_moe/mxfp4_moe_kernels.inl"
}  // namespace
}  // namespace avx512x

const MoeKernels mxfp4_moe_avx512x = {avx512x::kMoeF32, avx512x::kMoeBf16, avx512x::kMoeI8};

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
