// Division without the calls that it compiles to: of integers of 64 bits, and of floats, for sizes that don't occur.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../tensor.h"
#include "ptx.h"

namespace fastllm::cuda {

// 1 / x for 2^-126 <= |x| <= 2^126, within one rounding step; NaN for NaN.
__device__ inline float reciprocal(float x) {
  const float y = approximate_reciprocal(x);
  return fmaf(y, fmaf(-x, y, 1.0f), y);
}

struct Divided {
  int64_t quotient, rest;
};

// n >= 0
__device__ inline Divided divide(int64_t n, const Divisor& by) {
  const int64_t quotient = int64_t(__umul64hi(2 * uint64_t(n), by.multiplier) >> by.shift);
  return {quotient, n - quotient * by.value};
}

}  // namespace fastllm::cuda
