// Rotary position embedding of one tensor, pair by pair in the first 2 * half columns; pair i is
// (x[i], x[i + half]), or (x[2i], x[2i + 1]) where interleaved:
//   (a, b) -> (a * cos[p, i] - b * sin[p, i], b * cos[p, i] + a * sin[p, i])    in float32; the columns after pass
// inverse turns back (sin counts negative), which is the backward. Row r belongs to token r / heads, at
// position p = positions[token], or token % seq without positions. out may be x itself.
#pragma once

#include "attention.h"

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

// The same of the tokens of a step: q [tokens, heads, dim] turned into out, contiguous, k [tokens, kv_heads, dim] into
// k_cache, and v copied into v_cache. Caches are pools of pages, [pages, page_size, kv_heads, dim], whose Heads go from
// page to page with `batch`. Token t is written at slots[t] = page * page_size + offset; not where that is negative.
struct RopeAppend {
  Heads q, k, v, k_cache, v_cache;
  const float *cos, *sin;
  const int64_t *positions, *slots;  // [tokens]
  void* out;
  int64_t tokens, heads, kv_heads, dim, half, max_seq, pages, page_size;
  bool interleaved;
  DType dtype;
};

}  // namespace fastllm
