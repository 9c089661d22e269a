#if defined(MXMOE_X86_KERNELS)
#include "ops/kv_cache/kv_cache.h"

#include "simd/avx2.h"

#include "core/target_avx2.h"
namespace mxmoe {
namespace avx2 {
namespace {
#include "ops/kv_cache/kv_cache_kernel.inl"
}  // namespace
}  // namespace avx2

void kv_cache_write_avx2(const KvRows& rows) { avx2::write_any(rows); }

}  // namespace mxmoe
#include "core/target_end.h"
#endif  // MXMOE_X86_KERNELS
