// Kernels, right and deliberately wrong ones, that test the emulator's copies, ldmatrix and mma.sync.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "selftest.h"

using namespace fastllm::cuda;

// ---- the instructions ------------------------------------------------------------------------------

// The registers of each warp, as they are.
template <typename T>
__global__ void multiply_registers(const float* d, const uint32_t* a, const uint32_t* b, float* out, int times) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  float sums[4];
  uint32_t left[4];
  for (int i = 0; i < 4; ++i) {
    sums[i] = d[4 * t + i];
    left[i] = a[4 * t + i];
  }
  for (int i = 0; i < times; ++i) multiply(T(), sums, left, b[2 * t], b[2 * t + 1]);
  for (int i = 0; i < 4; ++i) out[4 * t + i] = sums[i];
}

// Lane l brings row rows[l] of `in`, 128 rows of 8 elements.
__global__ void load_rows(const uint4* in, const int* rows, uint32_t* out, bool transposed) {
  uint4* shared = dynamic_shared<uint4>();
  for (int i = threadIdx.x; i < 128; i += 32) shared[i] = in[i];
  __syncwarp();
  uint32_t matrices[4];
  if (transposed)
    load_matrices_transposed(matrices, shared + rows[threadIdx.x]);
  else
    load_matrices(matrices, shared + rows[threadIdx.x]);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = matrices[i];
}

__global__ void load_static(const uint4* in, uint32_t* out) {
  __shared__ uint4 rows[32];
  rows[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t matrices[4];
  load_matrices(matrices, rows + threadIdx.x);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = matrices[i];
}

__global__ void load_at(int offset) {
  uint32_t matrices[4];
  load_matrices(matrices, dynamic_shared<unsigned char>() + (threadIdx.x == 9 ? offset : 0));
}

__global__ void exp2_all(const float* in, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = approximate_exp2(in[i]);
}

// ---- copies ----------------------------------------------------------------------------------------

enum Fault {
  kNone,
  kNoWait,         // ldmatrix before the wait
  kWaitTooShort,   // the group that is read may still be under way
  kNoBarrier,      // none between the wait and ldmatrix
  kWarpBarrier,    // __syncwarp, and rows that the other warp brings
  kBeginsEarly,    // the next copies go where another warp may still read
  kEndsEarly,      // a copy is under way when the thread ends
};

// A ring of kStages tiles of 64 rows of 16 bytes. Of each tile two warps bring half each and read all. Of those with
// an odd number, the last 8 rows are zeros.
template <int kStages>
__global__ void ring(const uint4* in, uint32_t* out, int tiles, Fault fault) {
  uint4* shared = dynamic_shared<uint4>();
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  const auto begin = [&](int tile) {
    if (tile < tiles) copy_async(shared + tile % kStages * 64 + t, in + tile * 64 + t, tile % 2 == 0 || t < 56);
    commit_copies();  // an empty group where there is no tile: the count stays right
  };
  for (int tile = 0; tile < kStages - 1; ++tile) begin(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    if (fault == kEndsEarly && tile == tiles - 1) return;
    if (fault == kBeginsEarly) begin(tile + kStages - 1);
    if (fault == kWaitTooShort || fault == kBeginsEarly)
      wait_copies<kStages - 1>();
    else if (fault != kNoWait)
      wait_copies<kStages - 2>();
    if (fault == kWarpBarrier)
      __syncwarp();
    else if (fault != kNoBarrier)
      __syncthreads();
    if (fault != kBeginsEarly) begin(tile + kStages - 1);  // where the tile before was, which all have read
    for (int half = 0; half < 2; ++half) {
      uint32_t matrices[4];
      load_matrices(matrices, shared + tile % kStages * 64 + half * 32 + lane);
      for (int i = 0; i < 4; ++i) out[((tile * 2 + warp) * 2 + half) * 128 + lane * 4 + i] = matrices[i];
    }
  }
}

// What each lane brings and reads itself needs no more than its warp's barrier.
__global__ void own_rows(const uint4* in, uint32_t* out, bool barrier) {
  uint4* shared = dynamic_shared<uint4>();
  const int t = threadIdx.x;
  copy_async(shared + t, in + t);
  commit_copies();
  wait_copies<0>();
  if (barrier) __syncwarp();
  uint32_t matrices[4];
  load_matrices(matrices, shared + t);
  for (int i = 0; i < 4; ++i) out[4 * t + i] = matrices[i];
}

// 16 rows of 8 units, unit u of row r at u ^ (r & 7), and read there or, wrongly, at u.
__global__ void swizzled(const uint4* in, uint32_t* out, bool right) {
  uint4* shared = dynamic_shared<uint4>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 128; i += 32) copy_async(shared + (i / 8 * 8 + (i % 8 ^ (i / 8 & 7))), in + i);
  commit_copies();
  wait_copies<0>();
  __syncwarp();
  for (int k = 0; k < 4; ++k) {
    const int row = lane % 16, unit = 2 * k + lane / 16;
    uint32_t matrices[4];
    load_matrices(matrices, shared + row * 8 + (right ? unit ^ (row & 7) : unit));
    for (int i = 0; i < 4; ++i) out[(k * 32 + lane) * 4 + i] = matrices[i];
  }
}

// What the thread itself sees of a copy before the wait and after it.
__global__ void plain_reads(const uint4* in, uint32_t* before, uint32_t* after) {
  uint4* shared = dynamic_shared<uint4>();
  const int t = threadIdx.x;
  shared[t] = make_uint4(1, 1, 1, 1);
  copy_async(shared + t, in + t);
  commit_copies();
  before[t] = shared[t].x;
  wait_copies<0>();
  after[t] = shared[t].x;
}

// `times` copies of 16 bytes to one place, from one place.
__global__ void copy_at(const unsigned char* in, int from, int to, int times, bool commit, bool wait) {
  for (int i = 0; i < times; ++i) copy_async(dynamic_shared<unsigned char>() + to, in + from);
  if (commit) commit_copies();
  if (wait) wait_copies<0>();
}

// ---- what the tests call ---------------------------------------------------------------------------

EXPORT const char* run_multiply(bool half, const float* d, const uint32_t* a, const uint32_t* b, float* out, int warps,
                                int times) {
  return caught([&] {
    launch(half ? multiply_registers<__half> : multiply_registers<__nv_bfloat16>, dim3(warps), dim3(32), 0, nullptr, d,
           a, b, out, times);
  });
}
EXPORT const char* run_load_rows(const uint4* in, const int* rows, uint32_t* out, bool transposed) {
  return caught([&] { launch(load_rows, dim3(1), dim3(32), 2048, nullptr, in, rows, out, transposed); });
}
EXPORT const char* run_load_static(const uint4* in, uint32_t* out) {
  return caught([&] { launch(load_static, dim3(1), dim3(32), 0, nullptr, in, out); });
}
EXPORT const char* run_load_at(int offset) {
  return caught([&] { launch(load_at, dim3(1), dim3(32), 1024, nullptr, offset); });
}
EXPORT const char* run_exp2(const float* in, float* out, int n) {
  return caught([&] { launch(exp2_all, dim3(1), dim3(32), 0, nullptr, in, out, n); });
}
EXPORT const char* run_ring(const uint4* in, uint32_t* out, int tiles, int stages, int fault) {
  return caught([&] {
    launch(stages == 2 ? ring<2> : ring<3>, dim3(2), dim3(64), stages * 1024, nullptr, in, out, tiles, Fault(fault));
  });
}
EXPORT const char* run_own_rows(const uint4* in, uint32_t* out, bool barrier) {
  return caught([&] { launch(own_rows, dim3(1), dim3(64), 1024, nullptr, in, out, barrier); });
}
EXPORT const char* run_swizzled(const uint4* in, uint32_t* out, bool right) {
  return caught([&] { launch(swizzled, dim3(1), dim3(32), 2048, nullptr, in, out, right); });
}
EXPORT const char* run_plain_reads(const uint4* in, uint32_t* before, uint32_t* after) {
  return caught([&] { launch(plain_reads, dim3(1), dim3(32), 512, nullptr, in, before, after); });
}
EXPORT const char* run_copy_at(const unsigned char* in, int from, int to, int times, bool commit, bool wait) {
  return caught([&] { launch(copy_at, dim3(1), dim3(1), 1024, nullptr, in, from, to, times, commit, wait); });
}
