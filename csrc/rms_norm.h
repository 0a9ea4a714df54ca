// RMSNorm, forward and backward: the arguments that the CPU and the CUDA kernels share.
//
//   forward    h = x + residual (or x), rounded to the dtype of the residual
//              rstd = 1 / sqrt(mean(h^2) + eps)            float32, one per row
//              y = h * rstd * (weight + weight_offset)     (weight left out: 1)
//   backward   g = dy * (weight + weight_offset),  xhat = h * rstd
//              dx = rstd * (g - xhat * mean(g * xhat)) + dh
//              dweight = sum over rows of dy * xhat
//
// All arithmetic is float32; y, h and dx are contiguous [rows, cols]. x and y forward and dy backward have dtype; the
// residual and h forward, and what follows from h backward (x, dh and dx), have sum_dtype, which is dtype or (on CPUs)
// float32; weight and dweight are [cols] in weight_dtype, which is dtype or float32. The weight's gradient is summed in
// a fixed order: `partials` rows of float32 workspace, then those rows.
#pragma once

#include "tensor.h"

namespace fastllm {

struct RmsNormForward {
  Rows x, residual;    // residual may be absent
  const void* weight;  // may be null
  void* y;
  void* h;  // written only with a residual
  float* rstd;  // null where no backward needs it
  int64_t rows, cols;
  float eps, weight_offset;
  DType dtype, sum_dtype, weight_dtype;
};

struct RmsNormBackward {
  Rows dy, x, dh;      // x is what was normalised (h); dh, the gradient of the returned sum, may be absent
  const void* weight;  // may be null
  const float* rstd;
  void* dx;
  void* dweight;     // null when the weight needs no gradient
  float* workspace;  // [partials, cols], where dweight is wanted
  int64_t partials;
  int64_t rows, cols;
  float weight_offset;
  DType dtype, sum_dtype, weight_dtype;
};

}  // namespace fastllm
