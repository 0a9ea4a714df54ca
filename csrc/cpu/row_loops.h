// Loops over a row in vectors, the end of a row included.
#pragma once

#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {

constexpr int64_t kParallelElements = 1 << 15;  // below this a second thread costs more than it brings

// Calls body(at, put) for each vector of a row: whole ones first, then the rest of it, if any. `at(p)` reads
// the vector at its place in the row p, `put(p, v)` writes it.
template <typename Body>
inline __attribute__((always_inline)) void for_each_vector(int64_t cols, Body&& body) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) {
    body([j](auto* p) { return load(p + j); }, [j](auto* p, vfloat v) { store(p + j, v); });
  }
  if (const int64_t rest = cols - j) {
    body([j, rest](auto* p) { return load_partial(p + j, rest); },
         [j, rest](auto* p, vfloat v) { store_partial(p + j, v, rest); });
  }
}

// The sum of term(at, put) over a row, in four accumulators: one would wait for each addition.
template <typename Term>
inline __attribute__((always_inline)) float sum_over(int64_t cols, Term&& term) {
  constexpr int kChains = 4;
  vfloat chains[kChains] = {};
  const int64_t whole = cols - cols % (kChains * kLanes);
  for (int64_t i = 0; i < whole; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const int64_t j = i + c * kLanes;
      chains[c] += term([j](auto* p) { return load(p + j); }, [j](auto* p, vfloat v) { store(p + j, v); });
    }
  }
  for_each_vector(cols - whole, [&](auto at, auto put) {
    chains[0] += term([&](auto* p) { return at(p + whole); }, [&](auto* p, vfloat v) { put(p + whole, v); });
  });
  return sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

}  // namespace fastllm::cpu::FASTLLM_ISA
