#if defined(MXMOE_X86_KERNELS)
#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avx2.h"

#include "core/target_avx2.h"
namespace mxmoe {
namespace avx2 {
namespace {
#include "ops/mxfp4_moe/mxfp4_moe_panels_kernels.inl"
}  // namespace
}  // namespace avx2

const MoeKernels mxfp4_moe_avx2 = avx2::kMoeWithPanels;
void combine_avx2(const CombineRow& row) { avx2::combine_rows(row); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
