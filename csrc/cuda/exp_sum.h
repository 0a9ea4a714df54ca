// The sum of exponentials of a row in one pass (Milakov and Gimelshein 2018, arXiv:1805.02867): each thread keeps
// the maximum of its scores and the sum of exp(score - maximum), which is scaled when the maximum moves.
#pragma once

#include "reduce.h"
#include "vec.h"

namespace fastllm::cuda {

// A logarithm to multiply its exponential with: below -200 that is 0, and 0 * -inf would be NaN.
__device__ inline float bounded(float log) { return fmaxf(log, -200.0f); }

// kMoment: also the sum of exp(score - shift) * (score - shift), which entropy takes.
template <bool kMoment = false>
struct ExpSum {
  float shift = -3.40282347e38f;  // the lowest number: less -inf would be NaN
  float sum = 0.0f, moment = 0.0f;

  template <int V>
  __device__ void add(const Floats<V>& scores) {
    float most = scores.at[0];
#pragma unroll
    for (int j = 1; j < V; ++j) most = fmaxf(most, scores.at[j]);
    if (most > shift) *this = moved(most);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float log = scores.at[j] - shift, e = expf(log);
      sum += e;
      if constexpr (kMoment) moment += e * bounded(log);
    }
  }

  // The same with another shift.
  __device__ ExpSum moved(float to) const {
    ExpSum other;
    const float by = expf(shift - to);
    other.shift = to;
    other.sum = sum * by;
    if constexpr (kMoment) other.moment = (moment + sum * bounded(shift - to)) * by;
    return other;
  }

  // Both, in no order.
  __device__ void join(const ExpSum& other) {
    *this = moved(fmaxf(shift, other.shift));
    const ExpSum moved = other.moved(shift);
    sum += moved.sum;
    if constexpr (kMoment) moment += moved.moment;
  }

  __device__ ExpSum over_warp(int width = kWarp) const {
    ExpSum warp = moved(warp_reduce(Max(), shift, width));
    warp.sum = warp_reduce(Sum(), warp.sum, width);
    if constexpr (kMoment) warp.moment = warp_reduce(Sum(), warp.moment, width);
    return warp;
  }

  // Over the threads of a row; each gets the row's. The sum is 0 where every score is -inf.
  template <bool kCluster>
  __device__ ExpSum over_row(Scratch<kCluster, kMoment ? 3 : 2>& scratch) const {
    if (!kCluster && blockDim.x <= kWarp) return over_warp(blockDim.x);
    const ExpSum mine = over_warp();
    Warps warps;
    if constexpr (kMoment)
      warps = scratch.exchange({mine.shift, mine.sum, mine.moment});
    else
      warps = scratch.exchange({mine.shift, mine.sum});
    ExpSum found;
    for (int i = warps.begin + threadIdx.x % kWarp; i < warps.end; i += kWarp) {
      ExpSum other;
      other.shift = scratch.of[0][i];
      other.sum = scratch.of[1][i];
      if constexpr (kMoment) other.moment = scratch.of[2][i];
      found.join(other);
    }
    return found.over_warp();
  }
};

}  // namespace fastllm::cuda
