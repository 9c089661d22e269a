// The vector vocabulary for AVX2 with AVX-VNNI: that of AVX2 and a dot product of bytes.
#pragma once

#include "simd/avx2.h"

#include "core/target_avxvnni.h"
namespace mxmoe {
namespace avxvnni {
using namespace avx2;

// Plus the four products of unsigned with signed bytes of each dword.
inline words add_dot(words sum, words u, words s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }

// Plus the two products of 16-bit numbers of each dword.
inline words add_dot_16(words sum, words a, words b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }

}  // namespace avxvnni
}  // namespace mxmoe
#include "core/target_end.h"
