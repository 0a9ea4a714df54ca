// Kernels in thread-block clusters, right and deliberately wrong ones, that test the emulator.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/reduce.h"
#include "selftest.h"

using namespace fastllm;
using namespace fastllm::cuda;

__global__ void places(int* out) {
  int* mine = out + 3 * blockIdx.x;
  if (threadIdx.x == 0) mine[0] = cluster_index(), mine[1] = cluster_rank(), mine[2] = cluster_size();
}

enum Fault {
  none, no_start, no_barrier, no_arrival, two_arrivals, one_warp_leaves, no_such_block, one_slot, block_has_ended,
  no_barrier_at_the_end, not_shared, no_wait, other_barrier, copy
};

// out[block][t] = what block t of its cluster has brought.
__global__ void tell(const float* in, float* out, Fault fault, bool dynamic) {
  __shared__ float of_block[kMaxCluster];
  float* slots = dynamic ? dynamic_shared<float>() : of_block;
  const int t = threadIdx.x, rank = cluster_rank(), size = cluster_size();
  if (fault != no_start) cluster_started();
  if (fault != no_start) cluster_wait();
  if (fault == block_has_ended && rank == size - 1) return;
  if (fault == copy) copy_async(dynamic_shared<void>(), in);
  const int slot = fault == one_slot ? 0 : rank;
  float* to = fault == not_shared ? out : slots + slot;
  if (t < size) store_to_block(to, in[blockIdx.x], fault == no_such_block ? t + 1 : t);
  if (fault == no_barrier_at_the_end) return;
  if (fault == one_warp_leaves && rank == 1 && t >= 32) return;
  if (fault == other_barrier && rank == 0) {
    cluster_arrive();
  } else if (fault != no_barrier && fault != no_arrival) {
    cluster_arrive();
  }
  if (fault == two_arrivals) cluster_arrive();
  if (fault != no_barrier && fault != no_wait) cluster_wait();
  if (t < size) out[blockIdx.x * size + t] = slots[t];
}

// out[block][turn] = what the blocks of its cluster have brought in that turn, in `buffers` that take turns.
__global__ void sum_in_turns(const float* in, float* out, int turns, int buffers) {
  __shared__ float slots[2][kMaxCluster];
  const int rank = cluster_rank(), size = cluster_size();
  cluster_started();
  cluster_wait();
  for (int turn = 0; turn < turns; ++turn) {
    float* mine = slots[turn % buffers];
    if (int(threadIdx.x) < size) store_to_block(mine + rank, in[blockIdx.x * turns + turn], threadIdx.x);
    cluster_arrive();
    cluster_wait();
    float sum = 0.0f;
    for (int r = 0; r < size; ++r) sum += mine[r];
    out[(blockIdx.x * blockDim.x + threadIdx.x) * turns + turn] = sum;
  }
}

template <typename Kernel, typename... Args>
const char* launched(Kernel kernel, int device, int grid, int threads, int size, Args... args) {
  return caught([&] {
    DeviceGuard guard(device);
    launch(kernel, Launch{dim3(grid), dim3(threads), 1024, size}, nullptr, args...);
  });
}

EXPORT const char* run_places(int* out, int device, int grid, int threads, int size) {
  return launched(places, device, grid, threads, size, out);
}
EXPORT const char* run_tell(const float* in, float* out, int grid, int size, int fault, bool dynamic) {
  return launched(tell, 0, grid, 64, size, in, out, Fault(fault), dynamic);
}
EXPORT const char* run_sum_in_turns(const float* in, float* out, int size, int turns, int buffers) {
  return launched(sum_in_turns, 0, size, 64, size, in, out, turns, buffers);
}
EXPORT const char* run_active_clusters(int* out, int size, int device) {
  return caught([&] {
    DeviceGuard guard(device);
    *out = active_clusters(places, size, 0, device);
  });
}
