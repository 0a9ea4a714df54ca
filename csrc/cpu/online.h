// The sum of exponentials of a row in one pass, however long it is (Milakov and Gimelshein 2018,
// arXiv:1805.02867): of exp(score - shift), where the shift follows the maximum, and the sum so far is scaled
// when it moves. Every scaling is a rounding, so the shift moves only when the maximum is 1 away; much farther
// and score - shift would round coarser than the exponential itself. Each lane of a vector keeps its own.
#pragma once

#include "row_loops.h"

namespace fastllm::cpu::FASTLLM_ISA {

constexpr int kGroup = 8;  // vectors that share one look at the maximum
constexpr float kSlack = 1.f;

// A logarithm to multiply its exponential with: below -200 that is 0, and 0 * -inf would be NaN.
inline vfloat bounded(vfloat log) { return maximum(log, broadcast(-200.f)); }

// kMoment: also the sum of exp(score - shift) * (score - shift), which entropy takes.
template <bool kMoment>
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
      if constexpr (kMoment) {
        const vfloat moved = bounded(shift_ - next);
        moment_block_ = (moment_block_ + block_ * moved) * by;
        moment_.add(total_.value() * moved);
        moment_.scale(by);
      }
      block_ *= by;
      total_.scale(by);
      shift_ = next;
    }
    vfloat pairs[2] = {}, moments[2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const vfloat e = exp(scores[i] - shift_);
      pairs[i % 2] += e;
      if constexpr (kMoment) moments[i % 2] += e * bounded(scores[i] - shift_);
    }
    block_ += pairs[0] + pairs[1];
    if constexpr (kMoment) moment_block_ += moments[0] + moments[1];
    if (++added_ == kBlock) {
      total_.add(block_);
      block_ = vfloat{};
      if constexpr (kMoment) {
        moment_.add(moment_block_);
        moment_block_ = vfloat{};
      }
      added_ = 0;
    }
  }

  float shift() const { return greatest(shift_); }
  // Of exp(score - shift()); 0 where every score is -inf.
  float sum() const { return FASTLLM_ISA::sum(mine() * exp(shift_ - shift())); }
  // Of exp(score - shift()) * (score - shift()).
  float moment() const {
    const vfloat behind = shift_ - shift();
    return FASTLLM_ISA::sum((moment_.value() + moment_block_ + mine() * bounded(behind)) * exp(behind));
  }

 private:
  vfloat mine() const { return total_.value() + block_; }

  vfloat shift_ = broadcast(-3.40282347e38f);  // the lowest number: less -inf would be NaN
  vfloat block_ = {};  // of the latest scores, fewer than kBlock groups
  LongSum total_;      // of those before them
  vfloat moment_block_ = {};
  LongSum moment_;
  int64_t added_ = 0;
};

// Adds up score(at) over a row; `at` reads a vector, as in for_each_vector.
template <bool kMoment = false, typename Score>
inline __attribute__((always_inline)) ExpSum<kMoment> exp_sum(int64_t cols, Score&& score) {
  ExpSum<kMoment> row;
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
  for (; j + kLanes <= cols; j += kLanes) row.template add<1>({score([j](auto* p) { return load(p + j); })});
  if (const int64_t rest = cols - j) {
    const vfloat last = score([j, rest](auto* p) { return load_partial(p + j, rest); });
    row.template add<1>({first_lanes(last, rest, -__builtin_inff())});
  }
  return row;
}

}  // namespace fastllm::cpu::FASTLLM_ISA
