// Sums and maxima over the threads that share a row, and sums over rows. A block is dim3(threads per row, rows):
// threads per row is a power of two up to a warp, or whole warps; the block is whole warps. kCluster: the blocks of a
// cluster, of up to kClusterThreads threads each, share one row.
#pragma once

#include <cuda_runtime.h>

#include "ptx.h"

namespace fastllm::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

struct Sum {
  static constexpr float kNothing = 0.0f;
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {  // drops NaN
  static constexpr float kNothing = -INFINITY;
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over aligned groups of `width` lanes, a power of two. Every lane gets it.
template <typename Op>
__device__ inline float warp_reduce(Op op, float value, int width = kWarp) {
  for (int offset = width / 2; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

constexpr int kMaxCluster = 16;
constexpr int kClusterThreads = 512;
// Two such blocks fit a multiprocessor, with 64 registers for each thread. Kernels that need all of those spill where
// ptxas compiles for compute capability 8.0: there they have one block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTightBlocks = 1;
#else
constexpr int kTightBlocks = 2;
#endif

struct Warps {
  int begin, end;
};

// Shared memory in which the warps of a row find kValues values of each other.
template <bool kCluster, int kValues = 1>
struct Scratch {
  float of[kValues][kCluster ? kMaxCluster * kClusterThreads / kWarp : kMaxWarps];

  // Every thread of the block calls it, with values that its warp agrees on. Those of the row's warps are then in
  // of[k][begin] to of[k][end - 1], the same in each block of a cluster: all of them get the same results. In a cluster
  // the threads have waited before for a barrier at which they arrived when they started: a block that has not started
  // has no memory to store to. Nothing is stored after the barrier here, so that a block may end behind it.
  // Two successive exchanges need different scratch; a third may take the first one's again, for who is there has met
  // all others in the second, where they had read what the first gave them.
  __device__ Warps exchange(const float (&values)[kValues]) {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if constexpr (kCluster) {
      const int size = cluster_size(), slot = cluster_rank() * warps + warp;
#pragma unroll
      for (int k = 0; k < kValues; ++k)
        if (lane < size) store_to_block(&of[k][slot], values[k], lane);
      cluster_arrive();
      cluster_wait();
      return {0, size * warps};
    } else {
      const int begin = threadIdx.y * warps;
#pragma unroll
      for (int k = 0; k < kValues; ++k)
        if (lane == 0) of[k][begin + warp] = values[k];
      __syncthreads();
      return {begin, begin + warps};
    }
  }
};

// Over the threads of one row. Every thread of the block calls it and gets its row's.
template <typename Op, bool kCluster>
__device__ inline float row_reduce(Op op, float value, Scratch<kCluster>& scratch) {
  if (!kCluster && blockDim.x <= kWarp) return warp_reduce(op, value, blockDim.x);
  const auto warps = scratch.exchange({warp_reduce(op, value)});
  float found = Op::kNothing;
  for (int i = warps.begin + threadIdx.x % kWarp; i < warps.end; i += kWarp) found = op(found, scratch.of[0][i]);
  return warp_reduce(op, found);
}

template <bool kCluster>
__device__ inline float row_sum(float value, Scratch<kCluster>& scratch) {
  return row_reduce(Sum(), value, scratch);
}

// Adds up the rows of sums[blockDim.y][width], in shared memory, into the first: pairwise, in an order
// that is always the same, with less rounding than one after the other. Every thread of the block calls it.
__device__ inline void fold_rows(float* sums, int width) {
  const int first = threadIdx.y * blockDim.x + threadIdx.x, step = blockDim.x * blockDim.y;
  for (int rows = blockDim.y; rows > 1;) {
    const int half = (rows + 1) / 2;
    __syncthreads();
    for (int i = first; i < (rows - half) * width; i += step) sums[i] += sums[half * width + i];
    rows = half;
  }
  __syncthreads();
}

}  // namespace fastllm::cuda
