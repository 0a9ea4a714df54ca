// The sum of exponentials of a row in one pass (Milakov and Gimelshein 2018, arXiv:1805.02867): each thread keeps
// the maximum of its scores and the sum of exp(score - maximum), which is scaled when the maximum moves.
#pragma once

#include "reduce.h"
#include "vec.h"

namespace fastllm::cuda {

struct ExpSum {
  float shift = -3.40282347e38f;  // the lowest number: less -inf would be NaN
  float sum = 0.0f;

  template <int V>
  __device__ void add(const Floats<V>& scores) {
    float most = scores.at[0];
#pragma unroll
    for (int j = 1; j < V; ++j) most = fmaxf(most, scores.at[j]);
    if (most > shift) {
      sum *= expf(shift - most);
      shift = most;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) sum += expf(scores.at[j] - shift);
  }

  // Over the threads of a row; each gets the row's. The sum is 0 where every score is -inf.
  __device__ ExpSum over_row(float (&scratch)[2][kMaxWarps]) const {
    ExpSum row;
    row.shift = row_max(shift, scratch[0]);
    row.sum = row_sum(sum * expf(shift - row.shift), scratch[1]);
    return row;
  }
};

}  // namespace fastllm::cuda
