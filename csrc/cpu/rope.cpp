// Rotary position embedding on CPUs. Memory-bound: one read and one write; the tables stay in the cache.
#include "../rope.h"

#include "kernels.h"
#include "memory.h"
#include "row_loops.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

template <typename T>
void rotate(const Rope& a) {
  T* outs = static_cast<T*>(a.out);
  expect_large_write(outs, a.rows * a.cols * static_cast<int64_t>(sizeof(T)));
  const float sign = a.inverse ? -1.f : 1.f;
  const int64_t passed = a.cols - 2 * a.half;
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t token = r / a.heads, position = a.positions ? a.positions[token] : token % a.seq;
    const float *cos = a.cos + position * a.half, *sin = a.sin + position * a.half;
    const T* x = row<T>(a.x, r);
    T* out = outs + r * a.cols;
    for_each_vector(a.half, [&](auto at, auto put) {
      const vfloat c = at(cos), s = at(sin) * sign, first = at(x), second = at(x + a.half);
      put(out, first * c - second * s);
      put(out + a.half, second * c + first * s);
    });
    if (passed) std::memcpy(out + 2 * a.half, x + 2 * a.half, passed * sizeof(T));
  }
}

}  // namespace

void rope(const Rope& a) {
  with_type(a.dtype, [&](auto tag) { rotate<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
