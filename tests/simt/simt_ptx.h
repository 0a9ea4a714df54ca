// C++ of the same meaning for the functions of csrc/cuda/ptx.h.
#pragma once

#include "clusters.h"
#include "copies.h"
#include "records.h"
#include "simt.h"
#include "tensor_cores.h"

namespace fastllm::cuda {

template <typename T>
inline T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::dynamic_shared());
}

inline void forget(uint4&) {}
inline void forget(int&) {}
inline void forget(float&) {}

// Wrong alignment is found, see README.md.
template <typename T>
inline T load_plainly(const T* from) {
  simt::count_read(from, sizeof(T));
  return *from;
}
template <typename T>
inline void store_plainly(T* to, const T& value) {
  simt::count_write(to, sizeof(T));
  *to = value;
}
inline void store_global(uint4* to, const uint4& words) { store_plainly(to, words); }

// As far off as the GPU's may be: one step of the last place, up or down.
inline float approximate_reciprocal(float x) {
  if (std::isnan(x)) return x;
  if (std::fabs(x) < 0x1p-126f) return std::copysign(INFINITY, x);
  const float exact = 1.0f / x;
  if (std::fabs(exact) < 0x1p-126f) return std::copysign(0.0f, x);
  return std::nextafter(exact, __float_as_uint(x) * 0x9e3779b9u >> 31 ? INFINITY : -INFINITY);
}

// As far off as the GPU's may be, too, but for whole numbers.
inline float approximate_exp2(float x) {
  if (std::fabs(x) < 0x1p-126f) return 1.0f;
  if (std::isnan(x)) return x;
  if (x < -126.0f) return 0.0f;
  const float exact = float(std::exp2(double(x)));
  if (x == std::floor(x)) return exact;
  return std::nextafter(exact, __float_as_uint(x) * 0x9e3779b9u >> 31 ? INFINITY : -INFINITY);
}

inline int cluster_index() { return int(blockIdx.x) / simt::cluster_size(); }
inline int cluster_size() { return simt::cluster_size(); }
inline int cluster_rank() { return simt::cluster_rank(); }
inline void cluster_started(SIMT_CALLER) { simt::cluster_arrive({"cluster_started", function, file, line}); }
inline void cluster_arrive(SIMT_CALLER) { simt::cluster_arrive({"cluster_arrive", function, file, line}); }
inline void cluster_wait(SIMT_CALLER) { simt::cluster_wait({"cluster_wait", function, file, line}); }
inline void store_to_block(float* to, float value, int rank, SIMT_CALLER) {
  simt::store_to_block(to, value, rank, {"store_to_block", function, file, line});
}

inline void copy_async(void* to, const void* from, bool there = true, SIMT_CALLER) {
  simt::copy_async(to, from, there, {"copy_async", function, file, line});
}
inline void copy_async(float* to, const float* from, bool there = true, SIMT_CALLER) {
  simt::copy_async(to, from, there, {"copy_async", function, file, line});
}
inline void commit_copies() { simt::commit_copies(); }
template <int N>
inline void wait_copies(SIMT_CALLER) {
  simt::wait_copies(N, {"wait_copies", function, file, line});
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row, SIMT_CALLER) {
  simt::load_matrices(matrices, row, false, {"load_matrices", function, file, line});
}
inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row, SIMT_CALLER) {
  simt::load_matrices(matrices, row, true, {"load_matrices_transposed", function, file, line});
}

inline void multiply(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_CALLER) {
  simt::multiply(simt::Element::float16, d, a, b0, b1, {"multiply", function, file, line});
}
inline void multiply(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_CALLER) {
  simt::multiply(simt::Element::bfloat16, d, a, b0, b1, {"multiply", function, file, line});
}

}  // namespace fastllm::cuda
