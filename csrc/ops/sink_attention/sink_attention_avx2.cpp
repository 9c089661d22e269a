#if defined(MXMOE_X86_KERNELS)
#include "ops/sink_attention/sink_attention.h"

#include <cmath>

#include "simd/avx2.h"

#include "core/target_avx2.h"
namespace mxmoe {
namespace avx2 {
namespace {
#include "ops/sink_attention/sink_attention_kernel.inl"
}  // namespace
}  // namespace avx2

const AttentionKernels sink_attention_avx2 = avx2::kAttention;

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
