// SwiGLU, forward and backward: out = silu(gate) * up with silu(x) = x / (1 + exp(-x)), in float32.
// out, dgate and dup are contiguous [rows, cols] in dtype.
#pragma once

#include "tensor.h"

namespace fastllm {

struct SwigluForward {
  Rows gate, up;
  void* out;
  int64_t rows, cols;
  DType dtype;
};

struct SwigluBackward {
  Rows dout, gate, up;
  void *dgate, *dup;
  int64_t rows, cols;
  DType dtype;
};

}  // namespace fastllm
