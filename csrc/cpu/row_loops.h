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

// A sum of many vectors, lane by lane: what each addition rounds away is added up beside it (TwoSum, Knuth), so that
// the error does not grow with their number.
class LongSum {
 public:
  inline void add(vfloat v) {
    const vfloat next = sum_ + v, seen = next - sum_;
    lost_ += (sum_ - (next - seen)) + (v - seen);
    sum_ = next;
  }
  inline void scale(vfloat by) {
    sum_ *= by;
    lost_ *= by;
  }
  inline vfloat value() const { return sum_ - sum_ == 0.f ? sum_ + lost_ : sum_; }  // lost_ of an infinity is NaN

 private:
  vfloat sum_ = {}, lost_ = {};
};

constexpr int64_t kBlock = 32;  // plain additions in a row before a LongSum takes their result

// The sum of term(at, put) over a row, in four accumulators: one would wait for each addition.
template <typename Term>
inline __attribute__((always_inline)) float sum_over(int64_t cols, Term&& term) {
  constexpr int kChains = 4;
  constexpr int64_t kStep = kChains * kLanes;
  LongSum total;
  vfloat chains[kChains] = {};
  const auto together = [&] { return (chains[0] + chains[1]) + (chains[2] + chains[3]); };
  const int64_t whole = cols - cols % kStep;
  int64_t i = 0;
  while (true) {
    const int64_t end = whole - i <= kBlock * kStep ? whole : i + kBlock * kStep;
    for (; i < end; i += kStep) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const int64_t j = i + c * kLanes;
        chains[c] += term([j](auto* p) { return load(p + j); }, [j](auto* p, vfloat v) { store(p + j, v); });
      }
    }
    if (i == whole) break;
    total.add(together());
    for (vfloat& chain : chains) chain = vfloat{};
  }
  for_each_vector(cols - whole, [&](auto at, auto put) {
    chains[0] += term([&](auto* p) { return at(p + whole); }, [&](auto* p, vfloat v) { put(p + whole, v); });
  });
  const vfloat rest = together();
  return sum(cols > kBlock * kStep ? total.value() + rest : rest);
}

}  // namespace fastllm::cpu::FASTLLM_ISA
