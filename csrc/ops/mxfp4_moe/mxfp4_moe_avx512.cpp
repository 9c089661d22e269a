#if defined(MXMOE_X86_KERNELS)
#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd/avx512.h"

#include "core/target_avx512.h"
namespace mxmoe {
namespace avx512 {
namespace {
#include "ops/mxfp4_moe/mxfp4_moe_panels_kernels.inl"
}  // namespace
}  // namespace avx512

const MoeKernels mxfp4_moe_avx512 = avx512::kMoeWithPanels;
void combine_avx512(const CombineRow& row) { avx512::combine_rows(row); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
