// The arithmetic of rope, for every kernel that rotates: all give the same bits.
#pragma once

#include "cuda/numeric.cuh"

namespace mxmoe {
namespace cuda {

// Values d and d + head_dim / 2 of a head.
__device__ __forceinline__ float2 rotate(float first, float second, float cos, float sin) {
  return make_float2(__fmaf_rn(first, cos, -__fmul_rn(second, sin)), __fmaf_rn(second, cos, __fmul_rn(first, sin)));
}

}  // namespace cuda
}  // namespace mxmoe
