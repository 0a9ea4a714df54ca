// SwiGLU: bound by memory, in 16-byte accesses; forward moves two reads and one write, backward three reads and
// two writes. A thread loads all its vectors before it computes.

#include "swiglu.h"

#include <algorithm>

#include "divide.h"
#include "launch.h"
#include "vec.h"

namespace fastllm::cuda {
namespace swiglu {

constexpr int kVectors = 2;    // of each tensor and thread
constexpr int kThreads = 256;  // of a block

// exp(-|x|) does not overflow, so that the divisor is at most 2.
__device__ inline float sigmoid(float x) {
  const float e = expf(-fabsf(x)), r = reciprocal(1.0f + e);
  return x < 0.0f ? e * r : r;
}

// Where a thread's vectors are: the `blocks` that share a group of rows come one after another.
template <int V>
struct Place {
  int64_t row, col, step;

  __device__ explicit Place(const Divisor& blocks) {
    const Divided block = divide(blockIdx.x, blocks);
    step = blockDim.x * V;
    row = block.quotient * blockDim.y + threadIdx.y;
    col = block.rest * (kVectors * step) + threadIdx.x * V;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) swiglu_forward_kernel(const SwigluForward a, const Divisor blocks) {
  const Place<V> at(blocks);
  if (at.row >= a.rows) return;
  const T *gates = row_of<T>(a.gate, at.row) + at.col, *ups = row_of<T>(a.up, at.row) + at.col;
  T* out = static_cast<T*>(a.out) + at.row * a.cols + at.col;
  Vec<T, V> gate[kVectors], up[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (at.col + i * at.step >= a.cols) continue;
    gate[i] = load_readonly<V>(gates + i * at.step);
    up[i] = load_readonly<V>(ups + i * at.step);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (at.col + i * at.step >= a.cols) continue;
    const Floats<V> g = unpack(gate[i]);
    Floats<V> y = unpack(up[i]);
#pragma unroll
    for (int j = 0; j < V; ++j) y.at[j] *= g.at[j] * sigmoid(g.at[j]);
    store(out + i * at.step, pack<T>(y));
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(const SwigluBackward a, const Divisor blocks) {
  const Place<V> at(blocks);
  if (at.row >= a.rows) return;
  const T* douts = row_of<T>(a.dout, at.row) + at.col;
  const T *gates = row_of<T>(a.gate, at.row) + at.col, *ups = row_of<T>(a.up, at.row) + at.col;
  const int64_t to = at.row * a.cols + at.col;
  Vec<T, V> dout[kVectors], gate[kVectors], up[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (at.col + i * at.step >= a.cols) continue;
    dout[i] = load_readonly<V>(douts + i * at.step);
    gate[i] = load_readonly<V>(gates + i * at.step);
    up[i] = load_readonly<V>(ups + i * at.step);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (at.col + i * at.step >= a.cols) continue;
    Floats<V> d = unpack(dout[i]), g = unpack(gate[i]);
    const Floats<V> u = unpack(up[i]);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float s = sigmoid(g.at[j]), y = g.at[j] * s, dy = d.at[j];
      d.at[j] = dy * y;                                        // of up
      g.at[j] = dy * u.at[j] * (s + y * (1.0f - s));           // of gate
    }
    store(static_cast<T*>(a.dup) + to + i * at.step, pack<T>(d));
    store(static_cast<T*>(a.dgate) + to + i * at.step, pack<T>(g));
  }
}

template <int V, typename Args>
void run(void (*kernel)(Args, Divisor), const Args& a, cudaStream_t stream) {
  const dim3 block = block_for(ceil_div(a.cols, V), kVectors, kThreads, kThreads);
  const int64_t blocks = ceil_div(a.cols, int64_t(kVectors) * block.x * V);
  launch(kernel, dim3(unsigned(ceil_div(a.rows, block.y) * blocks)), block, 0, stream, a, blocks);
}

template <typename T>
void forward(const SwigluForward& a, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const bool whole = a.cols % V == 0 && aligned(a.gate, sizeof(T)) && aligned(a.up, sizeof(T)) && aligned(a.out);
  whole ? run<V>(swiglu_forward_kernel<T, V>, a, stream) : run<1>(swiglu_forward_kernel<T, 1>, a, stream);
}

template <typename T>
void backward(const SwigluBackward& a, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const bool whole = a.cols % V == 0 && aligned(a.dout, sizeof(T)) && aligned(a.gate, sizeof(T)) &&
                     aligned(a.up, sizeof(T)) && aligned(a.dgate) && aligned(a.dup);
  whole ? run<V>(swiglu_backward_kernel<T, V>, a, stream) : run<1>(swiglu_backward_kernel<T, 1>, a, stream);
}

}  // namespace swiglu

void swiglu_forward(const SwigluForward& a, int device, cudaStream_t stream) {
  if (a.rows * a.cols == 0) return;
  DeviceGuard guard(device);
  visit(a.dtype, [&](auto element) { swiglu::forward<decltype(element)>(a, stream); });
}

void swiglu_backward(const SwigluBackward& a, int device, cudaStream_t stream) {
  if (a.rows * a.cols == 0) return;
  DeviceGuard guard(device);
  visit(a.dtype, [&](auto element) { swiglu::backward<decltype(element)>(a, stream); });
}

}  // namespace fastllm::cuda
