// Cross-entropy of logits with class targets, forward and backward: what the CPU and CUDA kernels share.
//
// The logits are columns first_class, first_class + 1, … of `classes` in all: all of them, or one shard
// of a vocabulary that is spread over processes. With s = logits, or c * tanh(logits / c) with softcap c,
// K = classes, e = label_smoothing, w the class weights (all 1 where there are none), t the target:
//
//   lse    = log sum_j exp(s_j)                                               over the columns here
//   linear = (1 - e) * w_t * s_t + e / K * sum_j w_j * s_j                    over the columns here
//   total  = (1 - e) * w_t + e * mean_weight                                  mean_weight = sum_j w_j / K
//   loss   = total * lse - linear + z_loss * lse^2                            of a row whose columns are all here
//
//   dlogits_j = (a * exp(s_j - lse) - b * [j = t] - d * w_j) * (1 - (s_j / c)^2)
//               a = dloss * (total + 2 * z_loss * lse) + dlse,  b = dloss * (1 - e) * w_t,  d = dloss * e / K
//
// A shard (cols < classes) gives `linear` in place of the loss, and its own lse; its backward is told the
// lse of all shards. Rows whose target is ignore_index lose nothing and get no gradient through the loss;
// their lse is computed, for dlse. A target that is neither in [0, classes) nor ignore_index gives NaN, in
// loss and gradient, and reads nothing outside. All arithmetic is float32.
#pragma once

#include "tensor.h"

namespace fastllm {

struct CrossEntropy {
  Rows logits;
  const int64_t* target;      // [rows]
  const float* class_weight;  // [classes], or null
  const float* mean_weight;   // a scalar in the kernel's memory, with class_weight
  int64_t rows, cols;
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
  int64_t first_class, classes;
  DType dtype;
};

struct CrossEntropyForward : CrossEntropy {
  float *loss, *lse;  // [rows]
};

struct CrossEntropyBackward : CrossEntropy {
  const float* lse;    // [rows]
  const float* dloss;  // row r reads dloss[r * dloss_stride]; null counts 0
  int64_t dloss_stride;
  const float* dlse;  // [rows]; null counts 0
  void* dlogits;      // contiguous [rows, cols]; contiguous logits may be overwritten
};

}  // namespace fastllm
