// Sums and maxima over the threads that share a row, and sums over rows. A block is dim3(threads per row, rows):
// threads per row is a power of two up to a warp, or whole warps; the block is whole warps.
#pragma once

#include <cuda_runtime.h>

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

// Over the threads of one row (threadIdx.y). Every thread of the block calls it and gets its row's.
// Two successive calls need different scratch; a third may take the first one's again.
template <typename Op>
__device__ inline float row_reduce(Op op, float value, float (&scratch)[kMaxWarps]) {
  const int threads = blockDim.x;
  if (threads <= kWarp) return warp_reduce(op, value, threads);
  value = warp_reduce(op, value);
  const int warps = threads / kWarp, lane = threadIdx.x % kWarp;
  float* row = scratch + threadIdx.y * warps;
  if (lane == 0) row[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_reduce(op, lane < warps ? row[lane] : Op::kNothing);
}

__device__ inline float row_sum(float value, float (&scratch)[kMaxWarps]) { return row_reduce(Sum(), value, scratch); }
__device__ inline float row_max(float value, float (&scratch)[kMaxWarps]) { return row_reduce(Max(), value, scratch); }

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
