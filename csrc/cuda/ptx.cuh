// Every instruction that C++ has no word for, behind a named function. Nothing else holds inline assembly. The
// emulation has the same functions in emulation/ptx_emulated.h.
// Source: PTX ISA 9.0; the sections are named at each function.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(MXMOE_CUDA_EMULATION)
#include "cuda/emulation/ptx_emulated.h"
#else

namespace mxmoe {
namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The block's dynamic shared memory, the only kind the kernels use; aligned for wgmma's swizzled tiles.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// cp.async (9.7.9.25.3): 16 bytes from global to shared memory, both aligned to 16; zeros when not `valid`, and
// then the source is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until at most N of the groups this thread has committed are on their way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// ldmatrix (9.7.14.5.15): four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix
// l / 8, and receives of each matrix row l / 4, columns 2 (l % 4) and the next (transposed: those rows, column l /
// 4).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// mma.sync (9.7.14.5.8): c += a b with a 16 x 16 and b 16 x 8 of bfloat16, c float32. With g = lane / 4 and
// t = lane % 4: a[0] is row g, columns 2t and 2t + 1; a[1] row g + 8; a[2], a[3] the same at columns + 8. b[0] is
// rows 2t and 2t + 1 of column g, b[1] rows + 8. c[0], c[1] are row g, columns 2t and 2t + 1; c[2], c[3] row g + 8.
__device__ __forceinline__ void mma_bf16_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// cvt.rn.bf16x2.f32 (9.7.9.22): to nearest, ties to even; `low` in the lower half. NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// mul.bf16x2 (9.7.4.3): two products, rounded to nearest, subnormals kept. On sm_80 the same by way of fma (9.7.4.4).
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
#if __CUDA_ARCH__ >= 900
  asm("mul.rn.bf16x2 %0, %1, %2;\n" : "=r"(product) : "r"(a), "r"(b));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
#endif
  return product;
}

// ex2.approx (9.7.3.21): 2^x within 2 units in the last place; 2^-inf is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// ld.global.nc (9.7.9.9): 16 bytes, aligned, that no kernel writes while this one runs and that are read once:
// they need not push anything out of the first-level cache.
__device__ __forceinline__ uint4 load_once_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// mbarrier (9.7.13.15), from sm_90 on: a barrier in shared memory, 8 bytes, whose phases end when `count` threads
// have arrived; what they wrote before can be read by who has waited. Phases count from 0; waiting is for the end of
// the last one with that parity, so that parity 1 of a barrier that is new does not wait. A barrier can be used by
// others than the one that initialised it after __syncthreads.
__device__ __forceinline__ void phase_init(uint64_t* barrier, unsigned count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}
__device__ __forceinline__ void phase_arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(shared_address(barrier))
               : "memory");
#endif
}
__device__ __forceinline__ void phase_wait(uint64_t* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  unsigned done = 0;
  while (done == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
#endif
}

// griddepcontrol (9.7.13.13): what the kernel ahead in the stream wrote can be read after the wait; the kernel behind
// may start its blocks from the release on. Nothing where the instruction is missing and launches never overlap.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void release_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace ptx
}  // namespace mxmoe

#include "cuda/wgmma.cuh"

#endif
