#include "ops/sink_attention/sink_attention.h"

#include <cmath>

#include "simd/scalar.h"

namespace mxmoe {
namespace scalar {
namespace {
#include "ops/sink_attention/sink_attention_kernel.inl"
}  // namespace
}  // namespace scalar

const AttentionKernels sink_attention_scalar = scalar::kAttention;

}  // namespace mxmoe
