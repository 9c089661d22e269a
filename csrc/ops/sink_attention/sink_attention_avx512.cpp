#if defined(MXMOE_X86_KERNELS)
#include "ops/sink_attention/sink_attention.h"

#include <cmath>

#include "simd/avx512.h"

#include "core/target_avx512.h"
namespace mxmoe {
namespace avx512 {
namespace {
#include "ops/sink_attention/sink_attention_kernel.inl"
}  // namespace
}  // namespace avx512

const AttentionKernels sink_attention_avx512 = avx512::kAttention;

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
