#if defined(MXMOE_X86_KERNELS)
#include "ops/linear/linear.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avx512.h"

#include "core/target_avx512.h"
namespace mxmoe {
namespace avx512 {
namespace {
#include "ops/linear/linear_panels_kernels.inl"
}  // namespace
}  // namespace avx512

const LinearKernels linear_avx512 = avx512::kLinearWithPanels;

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
