// What the GPU has and C++ has no words for. tests/simt/simt_ptx.h gives the CPU functions of the same
// meaning.
#pragma once

#include <cuda_runtime.h>

#ifdef SIMT_EMULATOR
#include <simt_ptx.h>
#else

namespace fastllm::cuda {

// The block's dynamic shared memory.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// Makes the compiler forget what it has computed from these words: it computes that again where it is
// needed, and meanwhile needs registers for the words alone.
__device__ inline void forget(uint4& words) {
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}
__device__ inline void forget(float& value) { asm volatile("" : "+f"(value)); }

// Stores 16 bytes of global memory at once. nvcc takes the plain store of a uint4 apart where it has moved the
// words' computation, and then often leaves it as four.
__device__ inline void store_global(uint4* to, const uint4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// 1 / x within one rounding step; what is below 2^-126 in size, of x and of the result, counts 0.
__device__ inline float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastllm::cuda

#endif
