// Vectors of elements moved by 16-byte accesses, and the conversions between element types and float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../tensor.h"
#include "divide.h"
#include "ptx.h"

namespace fastllm::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// A 32-bit word of a pair of elements, the first one in the low half.
__device__ inline float2 unpack_pair(__half, uint32_t word) {
  return __half22float2(reinterpret_cast<__half2&>(word));
}
__device__ inline float2 unpack_pair(__nv_bfloat16, uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ inline uint32_t pack_pair(__half, float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<uint32_t&>(pair);
}
__device__ inline uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(pair);
}

// How many elements one access moves.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// V elements as they are in memory: 16-byte words, or a single element where nothing is known of the
// alignment. Held as words, since the compiler would keep each half of an array in a register of its own.
template <typename T, int V>
struct Vec {
  static_assert(V * sizeof(T) % 16 == 0, "a vector is whole words or one element");
  static constexpr int kWords = V * sizeof(T) / 16;
  uint4 words[kWords];
};
template <typename T>
struct Vec<T, 1> {
  T value;
};

template <int V>
struct Floats {
  float at[V];
};

template <int V, typename T>
__device__ inline Vec<T, V> load(const T* from) {
  Vec<T, V> vec;
  if constexpr (V == 1) {
    vec.value = load_plainly(from);
  } else {
#pragma unroll
    for (int i = 0; i < vec.kWords; ++i) vec.words[i] = load_plainly(reinterpret_cast<const uint4*>(from) + i);
  }
  return vec;
}

// For memory that the kernel never writes: such a load may move ahead of stores.
template <int V, typename T>
__device__ inline Vec<T, V> load_readonly(const T* from) {
  Vec<T, V> vec;
  if constexpr (V == 1) {
    vec.value = __ldg(from);
  } else {
#pragma unroll
    for (int i = 0; i < vec.kWords; ++i) vec.words[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
  return vec;
}

template <int V, typename T>
__device__ inline void store(T* to, const Vec<T, V>& vec) {
  if constexpr (V == 1) {
    store_plainly(to, vec.value);
  } else {
#pragma unroll
    for (int i = 0; i < vec.kWords; ++i) store_global(reinterpret_cast<uint4*>(to) + i, vec.words[i]);
  }
}

// The same as the compiler sees fit: for shared memory, and where a row leaves no register for another order.
template <int V, typename T>
__device__ inline void store_freely(T* to, const Vec<T, V>& vec) {
#pragma unroll
  for (int i = 0; i < vec.kWords; ++i) store_plainly(reinterpret_cast<uint4*>(to) + i, vec.words[i]);
}

template <typename T, int V>
__device__ inline Floats<V> unpack(const Vec<T, V>& vec) {
  Floats<V> out;
  if constexpr (V == 1) {
    out.at[0] = to_float(vec.value);
  } else {
#pragma unroll
    for (int i = 0; i < vec.kWords; ++i) {
      const uint32_t words[4] = {vec.words[i].x, vec.words[i].y, vec.words[i].z, vec.words[i].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(T) == 4) {
          out.at[i * 4 + k] = __uint_as_float(words[k]);
        } else {
          const float2 pair = unpack_pair(T(), words[k]);
          out.at[i * 8 + k * 2] = pair.x;
          out.at[i * 8 + k * 2 + 1] = pair.y;
        }
      }
    }
  }
  return out;
}

template <typename T, int V>
__device__ inline Vec<T, V> pack(const Floats<V>& from) {
  Vec<T, V> vec;
  if constexpr (V == 1) {
    vec.value = from_float<T>(from.at[0]);
  } else {
#pragma unroll
    for (int i = 0; i < vec.kWords; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(T) == 4)
          words[k] = __float_as_uint(from.at[i * 4 + k]);
        else
          words[k] = pack_pair(T(), from.at[i * 8 + k * 2], from.at[i * 8 + k * 2 + 1]);
      }
      vec.words[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  return vec;
}

// Has a vector wait in its packed form for its next use.
template <typename T, int V>
__device__ inline void keep_packed(Vec<T, V>& vec) {
#pragma unroll
  for (int i = 0; i < vec.kWords; ++i) forget(vec.words[i]);
}

template <int V>
__device__ inline Floats<V> filled(float value) {
  Floats<V> out;
#pragma unroll
  for (int j = 0; j < V; ++j) out.at[j] = value;
  return out;
}

template <typename T, int V>
__device__ inline Vec<T, V> zeros() {
  return pack<T>(filled<V>(0.0f));
}

template <typename T>
__device__ inline const T* row_of(const Rows& rows, int64_t row) {
  const Divided at = divide(row, rows.inner);
  return static_cast<const T*>(rows.data) + at.quotient * rows.outer_stride + at.rest * rows.inner_stride;
}

// The same in kernels that fill the registers with a row: without the calls that these divisions may make, ptxas
// schedules so far ahead that it spills.
template <typename T>
__device__ inline const T* row_by_call(const Rows& rows, int64_t row) {
  const T* data = static_cast<const T*>(rows.data);
  const int64_t inner = rows.inner.value;
  if (inner == 1) return data + row * rows.outer_stride;  // spares a 64-bit division
  return data + row / inner * rows.outer_stride + row % inner * rows.inner_stride;
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline bool aligned(const Rows& rows, size_t element) {
  return aligned(rows.data) && rows.outer_stride * element % 16 == 0 && rows.inner_stride * element % 16 == 0;
}

inline size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Calls f with a value of the element type.
template <typename F>
void visit(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(float());
    case DType::float16: return f(__half());
    case DType::bfloat16: return f(__nv_bfloat16());
  }
}

}  // namespace fastllm::cuda
