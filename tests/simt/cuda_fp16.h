// float16, converted as the GPU does: to nearest, ties to even; every NaN becomes 0x7fff.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
  // The bits as those of a float, 2^112 too small; subnormals come out right as well.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

inline __half __float2half_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t sign = __float_as_uint(value) >> 16 & 0x8000;
  const float size = std::fabs(value);
  uint32_t bits;
  if (size >= 65520.0f) {
    bits = 0x7c00;  // halfway to the next power of two and beyond: infinity
  } else if (size < 0x1p-14f) {
    bits = uint32_t(std::nearbyint(size * 0x1p24f));  // subnormal: a multiple of 2^-24
  } else {
    const uint32_t exact = __float_as_uint(size) - (112u << 23);
    bits = (exact + 0xfff + (exact >> 13 & 1)) >> 13;
  }
  return {uint16_t(sign | bits)};
}

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
