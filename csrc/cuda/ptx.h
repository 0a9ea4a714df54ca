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

}  // namespace fastllm::cuda

#endif
