// The vector vocabulary for AVX-512 with VNNI and BF16 dot products.
#pragma once

#include <immintrin.h>

#include "core/fetch.h"
#include "core/types.h"

#define MXMOE_SIMD avx512x
#define MXMOE_SIMD_DOT 1  // vpdpbusd and vdpbf16ps are at hand

#include "core/target_avx512x.h"
namespace mxmoe {
namespace avx512x {
#include "simd/avx512_words.inl"
}  // namespace avx512x
}  // namespace mxmoe
#include "core/target_end.h"
