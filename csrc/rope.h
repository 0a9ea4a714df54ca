// Rotary position embedding of one tensor, pair by pair in the first 2 * half columns; pair i is
// (x[i], x[i + half]), or (x[2i], x[2i + 1]) where interleaved:
//   (a, b) -> (a * cos[p, i] - b * sin[p, i], b * cos[p, i] + a * sin[p, i])    in float32; the columns after pass
// inverse turns back (sin counts negative), which is the backward. Row r belongs to token r / heads, at
// position p = positions[token], or token % seq without positions. out may be x itself.
#pragma once

#include "tensor.h"

namespace fastllm {

struct Rope {
  Rows x, out;
  const float *cos, *sin;    // [max_seq, half]
  const int64_t* positions;  // [rows / heads], or null
  int64_t rows, cols, heads;
  Divisor seq;
  int64_t half, max_seq;
  bool interleaved, inverse;
  DType dtype;
};

}  // namespace fastllm
