// Rotary position embedding of one tensor, its pairs in the two halves of the first 2 * half columns:
//   out[i]        = x[i] * cos[p, i] - x[i + half] * sin[p, i]
//   out[i + half] = x[i + half] * cos[p, i] + x[i] * sin[p, i]        in float32; the columns after pass
// inverse turns back (sin counts negative), which is the backward. Row r belongs to token r / heads, at
// position p = positions[token], or token % seq without positions. out is contiguous [rows, cols].
#pragma once

#include "tensor.h"

namespace fastllm {

struct Rope {
  Rows x;
  const float *cos, *sin;    // [max_seq, half]
  const int64_t* positions;  // [rows / heads], or null
  void* out;
  int64_t rows, cols, heads, seq, half, max_seq;
  bool inverse;
  DType dtype;
};

}  // namespace fastllm
