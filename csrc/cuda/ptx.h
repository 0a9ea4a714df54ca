// What the GPU has and C++ has no words for. tests/simt/simt_ptx.h gives the CPU functions of the same
// meaning.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

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
__device__ inline void forget(int& value) { asm volatile("" : "+r"(value)); }
__device__ inline void forget(float& value) { asm volatile("" : "+f"(value)); }

// As C++ has them. The emulator counts what they move.
template <typename T>
__device__ inline T load_plainly(const T* from) {
  return *from;
}
template <typename T>
__device__ inline void store_plainly(T* to, const T& value) {
  *to = value;
}

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

// 2^x within two rounding steps; what is below 2^-126 in size, of x and of the result, counts 0.
__device__ inline float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- compute capability 8.0 and newer; on an older one it traps ----

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FASTLLM_ASM(...) __trap()
#else
#define FASTLLM_ASM(...) asm volatile(__VA_ARGS__)
#endif

__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Begins to copy 16 bytes to shared memory, or to fill them with zeros (then `from` is not read). Copies that a thread
// has begun form a group when it calls commit_copies; wait_copies waits until at most N of its groups are under way.
__device__ inline void copy_async(void* to, const void* from, bool there = true) {
  FASTLLM_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ inline void copy_async(float* to, const float* from, bool there = true) {  // the same of 4 bytes
  FASTLLM_ASM("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0)
               : "memory");
}
__device__ inline void commit_copies() { FASTLLM_ASM("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void wait_copies() {
  FASTLLM_ASM("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane l brings the address of row l % 8 of matrix l / 8, 16 bytes in shared
// memory, and gets the elements 2 (l % 4) and the next of row l / 4 of each; transposed, of each column l / 4.
__device__ inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  FASTLLM_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  FASTLLM_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a warp, [16, 8] += [16, 16] [16, 8], in float32. With g = lane / 4 and c = 2 (lane % 4), a lane has
// d: (g, c) (g, c + 1) (g + 8, c) (g + 8, c + 1); of a the pairs from (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8);
// of b the pairs down the column from (c, g), (c + 8, g).
__device__ inline void multiply(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FASTLLM_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FASTLLM_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#undef FASTLLM_ASM

// ---- compute capability 9.0 and newer: thread-block clusters; on an older one it traps ----

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTLLM_ASM(...) __trap()
#else
#define FASTLLM_ASM(...) asm volatile(__VA_ARGS__)
#endif

// Which of the grid's clusters, along x; which of its blocks; how many those are.
__device__ inline int cluster_index() {
  int index = 0;
  FASTLLM_ASM("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}
__device__ inline int cluster_rank() {
  int rank = 0;
  FASTLLM_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline int cluster_size() {
  int size = 0;
  FASTLLM_ASM("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The first arrival, as a block starts. It orders no accesses: nothing waits for it but cluster_wait.
__device__ inline void cluster_started() { FASTLLM_ASM("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
// Every thread of the cluster arrives; where it waits, it has all others' stores to shared memory from before theirs.
__device__ inline void cluster_arrive() { FASTLLM_ASM("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { FASTLLM_ASM("barrier.cluster.wait.aligned;" ::: "memory"); }

// Stores to where block `rank` of the cluster has what this one has at `to`, in shared memory.
__device__ inline void store_to_block(float* to, float value, int rank) {
  FASTLLM_ASM("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2;}" ::"r"(
                  shared_address(to)),
              "r"(rank), "f"(value)
              : "memory");
}

#undef FASTLLM_ASM

}  // namespace fastllm::cuda

#endif
