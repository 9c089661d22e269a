#include "ops/kv_cache/kv_cache.h"

#include "simd/scalar.h"

namespace mxmoe {
namespace scalar {
namespace {
#include "ops/kv_cache/kv_cache_kernel.inl"
}  // namespace
}  // namespace scalar

void kv_cache_write_scalar(const KvRows& rows) { scalar::write_any(rows); }

}  // namespace mxmoe
