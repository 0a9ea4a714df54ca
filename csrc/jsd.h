// The generalised Jensen-Shannon divergence of two models' logits, with its gradient (Agarwal et al. 2023,
// arXiv:2306.13649): what the CPU and CUDA kernels share. Of a row, with the scores logits * scale, scale = 1 / temperature,
// and of the scores of each model
//
//   log q = student's - lse,  log p = teacher's - lse,  d = log p - log q,  m = b p + a q
//   b = teacher_share (beta),  a = student_share (1 - beta)
//
//   b = 0 (forward KL)   loss = sum_j p_j d_j                                            dscore_j = q_j - p_j
//   a = 0 (reverse KL)   loss = -sum_j q_j d_j                                           dscore_j = -q_j (d_j + loss)
//   else                 loss = b sum_j p_j log(p_j / m_j) + a K                         dscore_j = a q_j (log(q_j / m_j) - K)
//                        K = sum_j q_j log(q_j / m_j)
//
//   dlogits_j = dloss * scale * dscore_j
//
// The logarithms are taken of ratios, and of the smaller probability by the larger one, so that nothing overflows and
// a probability that underflows still has one. With u = -|d| and w the share of the smaller one,
//
//   r = log(1 - w + w e^u) = log1p(w expm1(u)),  log(q / m), log(p / m) = -r, d - r where d <= 0, else -d - r, -r
//
// A term whose probability is exactly 0 is 0. Rows that mask leaves out have no loss and no gradient, nor have those
// whose dloss is 0 a gradient, whatever their logits hold. All arithmetic is float32.
#pragma once

#include "tensor.h"

namespace fastllm {

struct Jsd {
  const void *student, *teacher;  // contiguous [rows, cols]
  const uint8_t* mask;            // [rows], 0: left out; or null
  const float* dloss;             // row r reads dloss[r * dloss_stride]; null: no gradient
  int64_t dloss_stride;
  float* loss;    // [rows]
  void* dlogits;  // contiguous [rows, cols], and may be `student`; with dloss
  int64_t rows, cols;
  float teacher_share, student_share, scale;
  DType dtype;
};

}  // namespace fastllm
