// What a kernel is told about a tensor. Nothing here, or anywhere in csrc/, includes a torch header:
// the module is built without torch and serves every version of it.
#pragma once

#include <cstdint>

namespace fastllm {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// A number from 1 to 2^63 - 1, prepared for the GPU, where division by a variable is slow: for 0 <= n < 2^63
// n / value = (2 n * multiplier >> 64) >> shift (Granlund and Montgomery 1994, round-up method).
struct Divisor {
  int64_t value = 1;
  uint64_t multiplier = (uint64_t(1) << 63) + 1;
  int shift = 0;

  Divisor() = default;
  Divisor(int64_t value) : value(value) {
    if (value <= 1) return;
    while ((uint64_t(1) << shift) < uint64_t(value)) ++shift;
    multiplier = uint64_t(((unsigned __int128)1 << (63 + shift)) / uint64_t(value)) + 1;
  }
  operator int64_t() const { return value; }
};

// The rows of a tensor whose last dimension is contiguous, addressed in place.
// Row r starts at data + (r / inner) * outer_stride + (r % inner) * inner_stride elements: two levels
// are enough for heads cut out of a fused projection, and one (inner = 1) for a plain matrix.
struct Rows {
  const void* data = nullptr;
  Divisor inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace fastllm
