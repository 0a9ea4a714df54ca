// Kernels, right and deliberately wrong ones, that test the emulator.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/divide.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/reduce.h"
#include "cuda/vec.h"
#include "selftest.h"

using namespace fastllm;
using namespace fastllm::cuda;

__global__ void block_sum(const float* in, float* out, int n) {
  __shared__ Scratch<false> scratch;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[blockIdx.x * n + i];
  sum = row_sum(sum, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// out[t] = in[t - 1], through shared memory, with the barrier that this needs or without.
__global__ void shift(const float* in, float* out, bool with_barrier) {
  float* values = dynamic_shared<float>();
  const int t = threadIdx.x;
  values[t] = in[t];
  if (with_barrier) __syncthreads();
  out[t] = t == 0 ? 0.0f : values[t - 1];
}

__global__ void half_leaves() {
  if (threadIdx.x < blockDim.x / 2) __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void barrier_against_shuffle(float* out) {
  if (threadIdx.x % 32 == 5)
    __syncthreads();
  else
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}

__global__ void lane_left(float* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void unnamed_lane(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

__global__ void outside_mask() { __syncwarp(0x0000ffffu); }

__global__ void dynamic_memory(float* out) {
  out[threadIdx.x] = dynamic_shared<float>()[threadIdx.x];
  dynamic_shared<float>()[threadIdx.x] = 0.0f;
}

// What a block finds in static shared memory, which it then writes.
template <int kSize>
__global__ void static_memory_of_template(float* out) {
  __shared__ float values[kSize][2], more[kSize];
  for (int i = 0; i < 2; ++i) {
    out[3 * threadIdx.x + i] = values[threadIdx.x][i];
    values[threadIdx.x][i] = 0.0f;
  }
  out[3 * threadIdx.x + 2] = more[threadIdx.x];
  more[threadIdx.x] = 0.0f;
}
__global__ void static_memory(float* out) {
  __shared__ float values[96];
  out[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 0.0f;
}

// Each row of `out` is one kind of shuffle or vote.
__global__ void shuffles(int* out, int argument, int width) {
  const int t = threadIdx.x, lane = t % warpSize;
  const unsigned all = 0xffffffffu;
  out[0 * 64 + t] = __shfl_sync(all, t, argument, width);
  out[1 * 64 + t] = __shfl_xor_sync(all, t, argument, width);
  out[2 * 64 + t] = __shfl_up_sync(all, t, unsigned(argument), width);
  out[3 * 64 + t] = __shfl_down_sync(all, t, unsigned(argument), width);
  const unsigned odd = 0xaaaaaaaau;
  if (lane % 2 == 1) {  // half a warp on its own
    __syncwarp(odd);
    out[4 * 64 + t] = int(__ballot_sync(odd, lane < argument));
    out[5 * 64 + t] = __any_sync(odd, lane < argument) + 2 * __all_sync(odd, lane < argument);
  } else {
    out[4 * 64 + t] = int(__ballot_sync(~odd, lane < argument));
    out[5 * 64 + t] = __any_sync(~odd, lane < argument) + 2 * __all_sync(~odd, lane < argument);
  }
}

__global__ void order(int* out, int* count) {
  if (threadIdx.x == 0) out[(*count)++] = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

// A vector for each thread.
__global__ void copy(const float* in, float* out, bool readonly) {
  const int at = 4 * threadIdx.x;
  store(out + at, readonly ? load_readonly<4>(in + at) : load<4>(in + at));
}

__global__ void divide_all(const int64_t* numbers, int64_t n, const Divisor by, int64_t* quotients, int64_t* rests) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const Divided divided = divide(numbers[i], by);
    quotients[i] = divided.quotient;
    rests[i] = divided.rest;
  }
}

__global__ void reciprocals(const float* in, float* approximate, float* out, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    approximate[i] = approximate_reciprocal(in[i]);
    out[i] = reciprocal(in[i]);
  }
}

// ---- what the tests call ---------------------------------------------------------------------------

EXPORT const char* run_block_sum(const float* in, float* out, int blocks, int threads, int n) {
  return caught([&] { launch(block_sum, dim3(blocks), dim3(threads), 0, nullptr, in, out, n); });
}
EXPORT const char* run_shift(const float* in, float* out, int threads, bool with_barrier) {
  return caught([&] { launch(shift, dim3(1), dim3(threads), threads * sizeof(float), nullptr, in, out, with_barrier); });
}
EXPORT const char* run_half_leaves() {
  return caught([&] { launch(half_leaves, dim3(3), dim3(64), 0, nullptr); });
}
EXPORT const char* run_two_barriers() {
  return caught([&] { launch(two_barriers, dim3(1), dim3(64), 0, nullptr); });
}
EXPORT const char* run_wrong_shuffle(int which) {
  float out[64];
  const auto kernel = which == 0 ? barrier_against_shuffle : which == 1 ? lane_left : unnamed_lane;
  return caught([&] { launch(kernel, dim3(1), dim3(32), 0, nullptr, out); });
}
EXPORT const char* run_outside_mask() {
  return caught([&] { launch(outside_mask, dim3(1), dim3(32), 0, nullptr); });
}
EXPORT const char* run_dynamic_memory(float* out, int blocks, int threads, size_t bytes) {
  return caught([&] { launch(dynamic_memory, dim3(blocks), dim3(threads), bytes, nullptr, out); });
}
EXPORT const char* run_static_memory(float* out, int which, int blocks) {
  return caught([&] {
    if (which == 0) launch(static_memory, dim3(blocks), dim3(96), 0, nullptr, out);
    if (which == 1) launch(static_memory_of_template<32>, dim3(blocks), dim3(32), 0, nullptr, out);
    if (which == 2) launch(static_memory_of_template<64>, dim3(blocks), dim3(32), 0, nullptr, out);
  });
}
EXPORT const char* run_attribute(int attribute, int* value) {
  return caught([&] { check(cudaDeviceGetAttribute(value, cudaDeviceAttr(attribute), 0)); });
}
EXPORT const char* run_shuffles(int* out, int argument, int width) {
  return caught([&] { launch(shuffles, dim3(1), dim3(64), 0, nullptr, out, argument, width); });
}
EXPORT const char* run_order(int* out, int x, int y, int z, int threads) {
  int count = 0;
  return caught([&] { launch(order, dim3(x, y, z), dim3(threads), 0, nullptr, out, &count); });
}

EXPORT const char* run_copy(const float* in, float* out, int threads, bool readonly) {
  return caught([&] { launch(copy, dim3(2), dim3(threads), 0, nullptr, in, out, readonly); });
}
EXPORT const char* run_divide(const int64_t* numbers, int64_t n, int64_t by, int64_t* quotients, int64_t* rests) {
  return caught([&] { launch(divide_all, dim3(1), dim3(32), 0, nullptr, numbers, n, by, quotients, rests); });
}
EXPORT const char* run_reciprocals(const float* in, float* approximate, float* out, int64_t n) {
  return caught([&] { launch(reciprocals, dim3(1), dim3(32), 0, nullptr, in, approximate, out, n); });
}
EXPORT const char* run_on_device(int device, float* out, int threads) {
  return caught([&] {
    DeviceGuard guard(device);
    launch(dynamic_memory, dim3(1), dim3(threads), threads * sizeof(float), nullptr, out);
  });
}

EXPORT void from_float32(const float* in, uint16_t* bf16, uint16_t* half, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    bf16[i] = __float2bfloat16_rn(in[i]).bits;
    half[i] = __float2half_rn(in[i]).bits;
  }
}
EXPORT void to_float32(const uint16_t* in, float* bf16, float* half, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    bf16[i] = __bfloat162float(__nv_bfloat16{in[i]});
    half[i] = __half2float(__half{in[i]});
  }
}
