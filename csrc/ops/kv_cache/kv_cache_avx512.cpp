#if defined(MXMOE_X86_KERNELS)
#include "ops/kv_cache/kv_cache.h"

#include "simd/avx512.h"

#include "core/target_avx512.h"
namespace mxmoe {
namespace avx512 {
namespace {
#include "ops/kv_cache/kv_cache_kernel.inl"
}  // namespace
}  // namespace avx512

void kv_cache_write_avx512(const KvRows& rows) { avx512::write_any(rows); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
