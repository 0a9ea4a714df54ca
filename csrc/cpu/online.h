// The sum of exponentials of a row in one pass, however long it is (Milakov and Gimelshein 2018,
// arXiv:1805.02867): of exp(score - shift), where the shift follows the maximum, and the sum so far is scaled
// when it moves. Every scaling is a rounding, so the shift moves only when the maximum is 1 away; much farther
// and score - shift would round coarser than the exponential itself. Each lane of a vector keeps its own.
#pragma once

#include "row_loops.h"

namespace fastllm::cpu::FASTLLM_ISA {

constexpr int kGroup = 8;  // vectors that share one look at the maximum
constexpr float kSlack = 1.f;

class ExpSum {
 public:
  template <int N>
  inline __attribute__((always_inline)) void add(const vfloat (&scores)[N]) {
    vfloat most = scores[0];
#pragma GCC unroll 8
    for (int i = 1; i < N; ++i) most = maximum(most, scores[i]);
    if (any_greater(most, shift_ + kSlack)) {
      const vfloat next = maximum(most, shift_);
      const vfloat by = exp(shift_ - next);
      block_ *= by;
      total_.scale(by);
      shift_ = next;
    }
    vfloat pairs[2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) pairs[i % 2] += exp(scores[i] - shift_);
    block_ += pairs[0] + pairs[1];
    if (++added_ == kBlock) {
      total_.add(block_);
      block_ = vfloat{};
      added_ = 0;
    }
  }

  float shift() const { return greatest(shift_); }
  // Of exp(score - shift()); 0 where every score is -inf.
  float sum() const { return FASTLLM_ISA::sum((total_.value() + block_) * exp(shift_ - shift())); }

 private:
  vfloat shift_ = broadcast(-3.40282347e38f);  // the lowest number: less -inf would be NaN
  vfloat block_ = {};  // of the latest scores, fewer than kBlock groups
  LongSum total_;      // of those before them
  int64_t added_ = 0;
};

// Adds up score(at) over a row; `at` reads a vector, as in for_each_vector.
template <typename Score>
inline __attribute__((always_inline)) ExpSum exp_sum(int64_t cols, Score&& score) {
  ExpSum row;
  const int64_t whole = cols - cols % (kGroup * kLanes);
  for (int64_t i = 0; i < whole; i += kGroup * kLanes) {
    vfloat scores[kGroup];
#pragma GCC unroll 8
    for (int k = 0; k < kGroup; ++k) {
      const int64_t j = i + k * kLanes;
      scores[k] = score([j](auto* p) { return load(p + j); });
    }
    row.add(scores);
  }
  int64_t j = whole;
  for (; j + kLanes <= cols; j += kLanes) row.add<1>({score([j](auto* p) { return load(p + j); })});
  if (const int64_t rest = cols - j) {
    const vfloat last = score([j, rest](auto* p) { return load_partial(p + j, rest); });
    row.add<1>({first_lanes(last, rest, -__builtin_inff())});
  }
  return row;
}

}  // namespace fastllm::cpu::FASTLLM_ISA
