// C++ of the same meaning for the functions of csrc/cuda/ptx.h.
#pragma once

#include "simt.h"

namespace fastllm::cuda {

template <typename T>
inline T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::dynamic_shared());
}

inline void forget(uint4&) {}
inline void forget(float&) {}

inline void store_global(uint4* to, const uint4& words) { *to = words; }  // a wrong alignment is found, see README.md

// As far off as the GPU's may be: one step of the last place, up or down.
inline float approximate_reciprocal(float x) {
  if (std::isnan(x)) return x;
  if (std::fabs(x) < 0x1p-126f) return std::copysign(INFINITY, x);
  const float exact = 1.0f / x;
  if (std::fabs(exact) < 0x1p-126f) return std::copysign(0.0f, x);
  return std::nextafter(exact, __float_as_uint(x) * 0x9e3779b9u >> 31 ? INFINITY : -INFINITY);
}

}  // namespace fastllm::cuda
