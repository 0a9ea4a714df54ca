// Cross-entropy of logits with class targets, forward and backward: what the CPU and CUDA kernels share.
//
// The logits are columns first_class, first_class + 1, … of `classes` in all: all of them, or one shard
// of a vocabulary that is spread over processes. With s = f * logits, or f * c * tanh(logits / c) with softcap c,
// f = scale, K = classes, e = label_smoothing, w the class weights (all 1 where there are none), t the target:
//
//   lse    = log sum_j exp(s_j)                                               over the columns here
//   entropy = -sum_j p_j * log p_j,  log p_j = s_j - lse                      over the columns here
//   linear = (1 - e) * w_t * s_t + e / K * sum_j w_j * s_j                    over the columns here
//   total  = (1 - e) * w_t + e * mean_weight                                  mean_weight = sum_j w_j / K
//   loss   = total * lse - linear + z_loss * lse^2                            of a row whose columns are all here
//
//   dlogits_j = ((a - h * (entropy + log p_j)) * p_j - b * [j = t] - d * w_j) * f * (1 - tanh(logits_j / c)^2)
//               a = dloss * (total + 2 * z_loss * lse) + dlse,  b = dloss * (1 - e) * w_t,  d = dloss * e / K,
//               h = dentropy
//
// A shard (cols < classes) gives `linear` in place of the loss, and its own lse and entropy; its backward is told
// those of all shards. Rows whose target is ignore_index lose nothing, have an entropy of 0, and get no gradient
// through either; their lse is computed, for dlse. A target that is neither in [0, classes) nor ignore_index gives
// NaN, in loss and gradient, and reads nothing outside. All arithmetic is float32.
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
  float label_smoothing, z_loss, softcap, scale;
  int64_t first_class, classes;
  DType dtype;
};

struct CrossEntropyForward : CrossEntropy {
  float *loss, *lse;  // [rows]
  float* entropy;     // [rows], or null
};

struct CrossEntropyBackward : CrossEntropy {
  const float* lse;    // [rows]
  const float* dloss;  // row r reads dloss[r * dloss_stride]; null counts 0
  int64_t dloss_stride;
  const float* dlse;      // [rows]; null counts 0
  const float* dentropy;  // [rows], with entropy; null counts 0
  const float* entropy;   // [rows]
  void* dlogits;          // contiguous [rows, cols]; contiguous logits may be overwritten
};

}  // namespace fastllm
