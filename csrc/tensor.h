// What a kernel is told about a tensor. Nothing here, or anywhere in csrc/, includes a torch header:
// the module is built without torch and serves every version of it.
#pragma once

#include <cstdint>

namespace fastllm {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// The rows of a tensor whose last dimension is contiguous, addressed in place.
// Row r starts at data + (r / inner) * outer_stride + (r % inner) * inner_stride elements: two levels
// are enough for heads cut out of a fused projection, and one (inner = 1) for a plain matrix.
struct Rows {
  const void* data = nullptr;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace fastllm
