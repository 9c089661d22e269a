// The vector vocabulary for AVX-512 with VNNI dot products.
#pragma once

#include <immintrin.h>

#include "core/fetch.h"
#include "core/types.h"

#define MXMOE_SIMD avx512vnni

#include "core/target_avx512vnni.h"
namespace mxmoe {
namespace avx512vnni {
#include "simd/avx512_words.inl"
}  // namespace avx512vnni
}  // namespace mxmoe
#include "core/target_end.h"
