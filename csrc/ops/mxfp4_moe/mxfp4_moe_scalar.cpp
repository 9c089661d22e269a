#include "ops/mxfp4_moe/mxfp4_moe.h"

#include <cmath>

#include "simd/scalar.h"

namespace mxmoe {
namespace scalar {
namespace {
#include "ops/mxfp4_moe/mxfp4_moe_kernels.inl"
}  // namespace
}  // namespace scalar

const MoeKernels mxfp4_moe_scalar = {scalar::kMoeF32, scalar::kMoeBf16, scalar::kMoeI8};
void combine_scalar(const CombineRow& row) { scalar::combine_rows(row); }

}  // namespace mxmoe
