// RMSNorm on CPUs. Memory-bound: forward moves one read and one write of the tensor, backward two reads
// and one write. A row is read twice, the second time from the cache.
#include "../rms_norm.h"

#include <cmath>

#include "kernels.h"
#include "row_loops.h"
#include "workspace.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// weight + offset in float32, expanded once per call so that the row loops know no weight dtype.
class Scale {
 public:
  Scale(const void* weight, DType dtype, float offset, int64_t cols)
      : given_(weight && dtype == DType::float32 && offset == 0.f ? static_cast<const float*>(weight) : nullptr),
        owned_(given_ ? 0 : cols) {
    if (given_) return;
    if (!weight) {
      for (int64_t j = 0; j < cols; ++j) owned_[j] = 1.f;
      return;
    }
    with_type(dtype, [&](auto tag) {
      using W = decltype(tag);
      const W* w = static_cast<const W*>(weight);
      int64_t j = 0;
      for (; j + kLanes <= cols; j += kLanes) store(owned_ + j, load(w + j) + broadcast(offset));
      if (j < cols) store_partial(owned_ + j, load_partial(w + j, cols - j) + broadcast(offset), cols - j);
    });
  }
  const float* data() const { return given_ ? given_ : owned_; }

 private:
  const float* given_;
  Buffer<float> owned_;
};

// The types of x, y and dy, and of the residual and h; they may be one.
template <typename Body>
void with_types(DType dtype, DType sum_dtype, Body&& body) {
  with_type(dtype, [&](auto tag) {
    if (dtype == sum_dtype) {
      body(tag, tag);
    } else {
      body(tag, float{});
    }
  });
}

template <typename T, typename H>
float normalise(const H* h, float squares, const float* scale, T* y, int64_t cols, float eps) {
  const float rstd = 1.f / std::sqrt(squares / static_cast<float>(cols) + eps);
  for_each_vector(cols, [&](auto at, auto put) { put(y, at(h) * rstd * at(scale)); });
  return rstd;
}

template <typename T, typename H>
float forward_row(const T* x, const H* residual, const float* scale, T* y, H* h, int64_t cols, float eps) {
  if (!residual) {
    return normalise(x, sum_over(cols, [&](auto at, auto) { return at(x) * at(x); }), scale, y, cols, eps);
  }
  const float squares = sum_over(cols, [&](auto at, auto put) {
    const vfloat v = rounded<H>(at(x) + at(residual));
    put(h, v);
    return v * v;
  });
  return normalise(h, squares, scale, y, cols, eps);
}

template <typename T, typename H, bool kWeightGrad>
void backward_row(const T* dy, const H* x, const H* dh, const float* scale, float rstd, H* dx, float* dweight,
                  int64_t cols) {
  const float dot = sum_over(cols, [&](auto at, auto) { return at(dy) * at(scale) * at(x); });
  const float pull = dot * rstd * rstd * rstd / static_cast<float>(cols);
  for_each_vector(cols, [&](auto at, auto put) {
    const vfloat v = at(x), g = at(dy) * rstd;
    vfloat out = g * at(scale) - v * pull;
    if (dh) out += at(dh);
    put(dx, out);
    if constexpr (kWeightGrad) put(dweight, at(dweight) + g * v);
  });
}

template <typename T, typename H>
void forward(const RmsNormForward& a) {
  const Scale scale(a.weight, a.weight_dtype, a.weight_offset, a.cols);
  T* y = static_cast<T*>(a.y);
  H* h = static_cast<H*>(a.h);
  const int64_t elements = a.rows * a.cols;
  expect_large_write(y, elements * static_cast<int64_t>(sizeof(T)));
  if (a.residual) expect_large_write(h, elements * static_cast<int64_t>(sizeof(H)));
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const H* residual = a.residual ? row<H>(a.residual, r) : nullptr;
    const float rstd = forward_row(row<T>(a.x, r), residual, scale.data(), y + r * a.cols,
                                   a.residual ? h + r * a.cols : nullptr, a.cols, a.eps);
    if (a.rstd) a.rstd[r] = rstd;
  }
}

template <typename T, typename H, bool kWeightGrad>
void backward(const RmsNormBackward& a) {
  const Scale scale(a.weight, a.weight_dtype, a.weight_offset, a.cols);
  H* dx = static_cast<H*>(a.dx);
  expect_large_write(dx, a.rows * a.cols * static_cast<int64_t>(sizeof(H)));
  const int64_t parts = kWeightGrad ? a.partials : rms_norm_partials(a.rows);
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t part = 0; part < parts; ++part) {
    float* dweight = nullptr;
    if constexpr (kWeightGrad) {
      dweight = a.workspace + part * a.cols;
      std::memset(dweight, 0, a.cols * sizeof(float));
    }
    for (int64_t r = a.rows * part / parts; r < a.rows * (part + 1) / parts; ++r) {
      const H* dh = a.dh ? row<H>(a.dh, r) : nullptr;
      backward_row<T, H, kWeightGrad>(row<T>(a.dy, r), row<H>(a.x, r), dh, scale.data(), a.rstd[r], dx + r * a.cols,
                                      dweight, a.cols);
    }
  }
}

// dweight = the sum of the workspace's rows, first to last.
template <typename W>
void sum_partials(const RmsNormBackward& a) {
  constexpr int64_t kStrip = 16 * kLanes;
#pragma omp parallel for schedule(static) if (a.partials * a.cols > kParallelElements)
  for (int64_t first = 0; first < a.cols; first += kStrip) {
    const int64_t count = a.cols - first < kStrip ? a.cols - first : kStrip;
    float total[kStrip] = {};
    for (int64_t p = 0; p < a.partials; ++p) {
      const float* partial = a.workspace + p * a.cols + first;
      for_each_vector(count, [&](auto at, auto put) { put(total, at(total) + at(partial)); });
    }
    W* out = static_cast<W*>(a.dweight) + first;
    for_each_vector(count, [&](auto at, auto put) { put(out, at(total)); });
  }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
  with_types(a.dtype, a.sum_dtype, [&](auto t, auto h) { forward<decltype(t), decltype(h)>(a); });
}

void rms_norm_backward(const RmsNormBackward& a) {
  if (!a.dweight) {
    with_types(a.dtype, a.sum_dtype, [&](auto t, auto h) { backward<decltype(t), decltype(h), false>(a); });
    return;
  }
  with_types(a.dtype, a.sum_dtype, [&](auto t, auto h) { backward<decltype(t), decltype(h), true>(a); });
  with_type(a.weight_dtype, [&](auto tag) { sum_partials<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
