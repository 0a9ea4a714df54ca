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

}  // namespace fastllm::cuda
