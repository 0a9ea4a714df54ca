// SwiGLU on CPUs. Memory-bound: forward moves two reads and one write, backward three reads and two writes.
#include "../swiglu.h"

#include "kernels.h"
#include "memory.h"
#include "row_loops.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

template <typename T>
void forward(const SwigluForward& a) {
  T* out = static_cast<T*>(a.out);
  expect_large_write(out, a.rows * a.cols * static_cast<int64_t>(sizeof(T)));
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const T *gate = row<T>(a.gate, r), *up = row<T>(a.up, r);
    T* y = out + r * a.cols;
    for_each_vector(a.cols, [&](auto at, auto put) {
      const vfloat g = at(gate);
      put(y, g * sigmoid(g) * at(up));
    });
  }
}

template <typename T>
void backward(const SwigluBackward& a) {
  T *dgates = static_cast<T*>(a.dgate), *dups = static_cast<T*>(a.dup);
  expect_large_write(dgates, a.rows * a.cols * static_cast<int64_t>(sizeof(T)));
  expect_large_write(dups, a.rows * a.cols * static_cast<int64_t>(sizeof(T)));
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const T *dout = row<T>(a.dout, r), *gate = row<T>(a.gate, r), *up = row<T>(a.up, r);
    T *dgate = dgates + r * a.cols, *dup = dups + r * a.cols;
    for_each_vector(a.cols, [&](auto at, auto put) {
      const vfloat d = at(dout), g = at(gate), s = sigmoid(g), y = g * s;
      put(dup, d * y);
      put(dgate, d * at(up) * (s + y * (1.f - s)));
    });
  }
}

}  // namespace

void swiglu_forward(const SwigluForward& a) {
  with_type(a.dtype, [&](auto tag) { forward<decltype(tag)>(a); });
}

void swiglu_backward(const SwigluBackward& a) {
  with_type(a.dtype, [&](auto tag) { backward<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
