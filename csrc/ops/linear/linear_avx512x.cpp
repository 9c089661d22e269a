#if defined(MXMOE_X86_KERNELS)
#include "ops/linear/linear.h"

#include <cmath>

#include "simd/avx512x.h"

#include "core/target_avx512x.h"
namespace mxmoe {
namespace avx512x {
namespace {
#include "ops/linear/linear_kernels.inl"
}  // namespace
}  // namespace avx512x

const LinearKernels linear_avx512x = avx512x::kLinear;

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
