#if defined(MXMOE_X86_KERNELS)
#include "ops/linear/linear.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avx2.h"

#include "core/target_avx2.h"
namespace mxmoe {
namespace avx2 {
namespace {
#include "ops/linear/linear_panels_kernels.inl"
}  // namespace
}  // namespace avx2

const LinearKernels linear_avx2 = avx2::kLinearWithPanels;

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
