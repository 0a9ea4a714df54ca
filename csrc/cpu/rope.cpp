// Rotary position embedding on CPUs. Memory-bound: one read and one write; the tables stay in the cache.
#include "../rope.h"

#include "kernels.h"
#include "memory.h"
#include "row_loops.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

template <typename T>
void turn_halves(const T* x, T* out, const float* cos, const float* sin, float sign, int64_t half) {
  for_each_vector(half, [&](auto at, auto put) {
    const vfloat c = at(cos), s = at(sin) * sign, first = at(x), second = at(x + half);
    put(out, first * c - second * s);
    put(out + half, second * c + first * s);
  });
}

// Lanes 2i and 2i + 1 are a pair; a table's entries come twice, one after the other.
template <typename T>
void turn_neighbours(const T* x, T* out, const float* cos, const float* sin, float sign, int64_t half) {
  float twice_cos[kLanes], twice_sin[kLanes];
  for (int64_t i = 0; i < half; i += kLanes / 2) {
    const int64_t pairs = half - i < kLanes / 2 ? half - i : kLanes / 2;
    for (int64_t j = 0; j < pairs; ++j) {
      twice_cos[2 * j] = twice_cos[2 * j + 1] = cos[i + j];
      twice_sin[2 * j] = -sign * sin[i + j];
      twice_sin[2 * j + 1] = sign * sin[i + j];
    }
    const T* from = x + 2 * i;
    T* to = out + 2 * i;
    for_each_vector(2 * pairs, [&](auto at, auto put) {
      const vfloat v = at(from);
      put(to, v * at(twice_cos) + swap_neighbours(v) * at(twice_sin));
    });
  }
}

template <typename T>
void rotate(const Rope& a) {
  const bool in_place = a.x.data == a.out.data;
  if (!in_place) expect_large_write(const_cast<void*>(a.out.data), a.rows * a.cols * static_cast<int64_t>(sizeof(T)));
  const float sign = a.inverse ? -1.f : 1.f;
  const int64_t passed = a.cols - 2 * a.half;
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t token = r / a.heads, position = a.positions ? a.positions[token] : token % a.seq;
    const float *cos = a.cos + position * a.half, *sin = a.sin + position * a.half;
    const T* x = row<T>(a.x, r);
    T* out = const_cast<T*>(row<T>(a.out, r));
    a.interleaved ? turn_neighbours(x, out, cos, sin, sign, a.half) : turn_halves(x, out, cos, sin, sign, a.half);
    if (passed && !in_place) std::memcpy(out + 2 * a.half, x + 2 * a.half, passed * sizeof(T));
  }
}

// Head 0 of a token: of a page's where there are pages.
template <typename T>
T* token_at(const Heads& x, int64_t page, int64_t t) {
  return static_cast<T*>(const_cast<void*>(x.data)) + page * x.batch + t * x.token;
}

template <typename T>
void append(const RopeAppend& a) {
  const int64_t passed = a.dim - 2 * a.half;
#pragma omp parallel for schedule(static) if (a.tokens * (a.heads + 2 * a.kv_heads) * a.dim > kParallelElements)
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float *cos = a.cos + a.positions[t] * a.half, *sin = a.sin + a.positions[t] * a.half;
    const auto turn = [&](const T* x, T* out) {
      a.interleaved ? turn_neighbours(x, out, cos, sin, 1.f, a.half) : turn_halves(x, out, cos, sin, 1.f, a.half);
      if (passed) std::memcpy(out + 2 * a.half, x + 2 * a.half, passed * sizeof(T));
    };
    const T* q = token_at<T>(a.q, 0, t);
    T* out = static_cast<T*>(a.out) + t * a.heads * a.dim;
    for (int64_t head = 0; head < a.heads; ++head) turn(q + head * a.q.head, out + head * a.dim);
    if (a.slots[t] < 0) continue;
    const int64_t page = a.slots[t] / a.page_size, offset = a.slots[t] % a.page_size;
    const T *k = token_at<T>(a.k, 0, t), *v = token_at<T>(a.v, 0, t);
    T *k_out = token_at<T>(a.k_cache, page, offset), *v_out = token_at<T>(a.v_cache, page, offset);
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      turn(k + head * a.k.head, k_out + head * a.k_cache.head);
      std::memcpy(v_out + head * a.v_cache.head, v + head * a.v.head, a.dim * sizeof(T));
    }
  }
}

}  // namespace

void rope_append(const RopeAppend& a) {
  with_type(a.dtype, [&](auto tag) { append<decltype(tag)>(a); });
}

void rope(const Rope& a) {
  with_type(a.dtype, [&](auto tag) { rotate<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
