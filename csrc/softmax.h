// Softmax over rows, forward and backward: the arguments that the CPU and the CUDA kernels share.
//
//   forward    s = x * scale, -inf where a boolean mask is false, + mask where it is additive
//              y = exp(s - max s) / sum exp(s - max s)      0 where s is -inf, a row of -inf included
//   backward   dx = scale * y * (dy - sum(y * dy))
//
// All arithmetic is float32; y and dx are contiguous [rows, cols] in dtype. Causal (queries > 0): row r is
// query r % queries and sees its first `visible(...)` columns, aligned at the bottom right; the others count
// nothing, and give 0 (0 or NaN in a row in which a NaN is visible).
#pragma once

#include "tensor.h"

namespace fastllm {

enum class MaskKind : int { none = 0, boolean = 1, additive = 2, additive_float32 = 3 };  // additive: in dtype

// A mask that is broadcast to x. Row r reads the columns after data + (r / (inner * middle)) * outer_stride
// + (r / inner % middle) * middle_stride + (r % inner) * inner_stride elements: [batch, 1, queries, keys]
// against [batch, heads, queries, keys] needs three levels.
struct Mask {
  const void* data = nullptr;
  int64_t middle = 1, inner = 1;
  int64_t outer_stride = 0, middle_stride = 0, inner_stride = 0;
  MaskKind kind = MaskKind::none;
};

struct SoftmaxForward {
  Rows x;
  Mask mask;
  void* y;
  int64_t rows, cols, queries;
  float scale;
  DType dtype;
};

struct SoftmaxBackward {
  Rows dy, y;
  void* dx;
  int64_t rows, cols, queries;
  float scale;
  DType dtype;
};

#ifdef __CUDACC__
__host__ __device__
#endif
inline int64_t visible(int64_t row, int64_t cols, int64_t queries) {
  if (queries == 0) return cols;
  const int64_t seen = row % queries + cols - queries + 1;
  return seen < 0 ? 0 : seen;
}

}  // namespace fastllm
