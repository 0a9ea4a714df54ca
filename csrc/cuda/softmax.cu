// Softmax: bound by memory, so a row is read once, in 16-byte accesses, and waits in registers, packed in its
// dtype, for its sum; those of a cluster (kCluster) where a block's do not hold it. Rows too long for that, or not
// aligned to 16 bytes, are read again (…_loop), from L2 as long as all of them fit it.
// The scores are computed twice, for the sum and for the result, and so a mask is read twice; it is small, as a
// rule, for it is broadcast. A thread holds N vectors of V elements, `threads per row` vectors apart.

#include "softmax.h"

#include <algorithm>

#include "exp_sum.h"
#include "launch.h"
#include "ptx.h"
#include "row.h"

namespace fastllm::cuda {
namespace softmax {

constexpr int kThreads = 128;  // of a block, where rows are short

// The elements of a boolean mask, which are bytes: a vector of them is one access of V bytes.
template <int V>
struct alignas(V) Bytes {
  uint8_t at[V];
};

// The mask of a row; kMasked: whether there is one.
template <typename T, bool kMasked>
struct MaskRow {
  MaskKind kind = MaskKind::none;
  const void* data = nullptr;
  int64_t offset = 0;

  __device__ MaskRow(const Mask& mask, int64_t row) {
    if constexpr (kMasked) {
      const int64_t group = row / mask.inner;
      kind = mask.kind;
      data = mask.data;
      offset = group / mask.middle * mask.outer_stride + group % mask.middle * mask.middle_stride +
               row % mask.inner * mask.inner_stride;
    }
  }

  // Masks the scores of the columns from `col` on. A boolean mask selects: what it hides may be NaN.
  template <int V>
  __device__ void apply(Floats<V>& s, int64_t col) const {
    if constexpr (kMasked) {
      const int64_t at = offset + col;
      if (kind == MaskKind::boolean) {
        const auto seen = *reinterpret_cast<const Bytes<V>*>(static_cast<const uint8_t*>(data) + at);
#pragma unroll
        for (int j = 0; j < V; ++j) s.at[j] = seen.at[j] ? s.at[j] : -INFINITY;
        return;
      }
      const Floats<V> added = kind == MaskKind::additive
                                  ? unpack(load_readonly<V>(static_cast<const T*>(data) + at))
                                  : unpack(load_readonly<V>(static_cast<const float*>(data) + at));
#pragma unroll
      for (int j = 0; j < V; ++j) s.at[j] += added.at[j];
    }
  }
};

// The scores of the columns from `col` on, of which those before `seen` are visible.
template <typename T, int V, bool kMasked, typename Index>
__device__ inline Floats<V> scores(const Vec<T, V>& x, float scale, const MaskRow<T, kMasked>& mask, Index col,
                                   Index seen) {
  if (col >= seen) return filled<V>(-INFINITY);
  Floats<V> s = unpack(x);
#pragma unroll
  for (int j = 0; j < V; ++j) s.at[j] *= scale;
  mask.apply(s, col);
#pragma unroll
  for (int j = 0; j < V; ++j) s.at[j] = col + j < seen ? s.at[j] : -INFINITY;
  return s;
}

// exp(s - shift) / sum; `inverse` is 1 / sum. In float32 a step of Newton's method makes up for its rounding.
template <typename T, int V>
__device__ inline Vec<T, V> probabilities(Floats<V> s, const ExpSum<>& row, float inverse) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float e = expf(s.at[j] - row.shift);
    s.at[j] = e * inverse;
    if constexpr (sizeof(T) == 4) s.at[j] = fmaf(fmaf(-s.at[j], row.sum, e), inverse, s.at[j]);
  }
  return pack<T>(s);
}

__device__ inline float inverse_of(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

template <typename T, int N, int kBlock, bool kMasked, bool kCluster = false>
__global__ void __launch_bounds__(kBlock, kBlock != kClusterThreads ? 1 : kMasked ? kTightBlocks : 2)
    softmax_forward_registers(const SoftmaxForward a) {
  constexpr int V = kVector<T>;
  __shared__ Scratch<kCluster, 2> scratch;
  if constexpr (kCluster) cluster_started();
  const auto [row, first, end] = RowColumns<V, kCluster>(a.cols);
  const int cols = row < a.rows ? end : 0;
  const int seen = min(cols, int(visible(row, a.cols, a.queries)));
  // eight vectors leave no registers for addresses: there they are constants
  const int step = (N == 8 ? kBlock : blockDim.x) * V;
  const T* x_row = row_by_call<T>(a.x, row);
  Vec<T, V> x[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    x[i] = first + i * step < seen ? load_readonly<V>(x_row + first + i * step) : zeros<T, V>();

  const MaskRow<T, kMasked> mask(a.mask, row < a.rows ? row : 0);
  ExpSum<> mine;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (first + i * step < seen) mine.add(scores(x[i], a.scale, mask, first + i * step, seen));
  if constexpr (kCluster) cluster_wait();
  const ExpSum<> found = mine.over_row(scratch);
  const float inverse = inverse_of(found.sum);

  T* y = static_cast<T*>(a.y) + row * a.cols;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int col = first + i * step;
    if (col >= cols) continue;
    keep_packed(x[i]);
    store(y + col, probabilities<T>(scores(x[i], a.scale, mask, col, seen), found, inverse));
  }
}

template <typename T, int V, bool kMasked>
__global__ void __launch_bounds__(kMaxThreads, V == 1 && !kMasked ? 2 : 1)
    softmax_forward_loop(const SoftmaxForward a) {
  __shared__ Scratch<false, 2> scratch;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = row < a.rows;
  const int64_t cols = inside ? a.cols : 0, seen = inside ? visible(row, a.cols, a.queries) : 0;
  const int64_t first = threadIdx.x * V, step = blockDim.x * V;
  const T* x = row_by_call<T>(a.x, row);
  const MaskRow<T, kMasked> mask(a.mask, inside ? row : 0);
  ExpSum<> mine;
  for (int64_t col = first; col < seen; col += step)
    mine.add(scores(load_readonly<V>(x + col), a.scale, mask, col, seen));
  const ExpSum<> found = mine.over_row(scratch);
  const float inverse = inverse_of(found.sum);

  T* y = static_cast<T*>(a.y) + row * a.cols;
  for (int64_t col = first; col < cols; col += step) {
    const Vec<T, V> read = col < seen ? load_readonly<V>(x + col) : zeros<T, V>();
    store(y + col, probabilities<T>(scores(read, a.scale, mask, col, seen), found, inverse));
  }
}

// ---- backward ------------------------------------------------------------------------------------

template <typename T, int V, typename Index>
__device__ inline float dot(const Vec<T, V>& dy, const Vec<T, V>& y, Index col, Index seen) {
  const Floats<V> g = unpack(dy), p = unpack(y);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (col + j < seen) sum += g.at[j] * p.at[j];
  return sum;
}

template <typename T, int V, typename Index>
__device__ inline Vec<T, V> input_gradient(const Vec<T, V>& dy, const Vec<T, V>& y, float dot, float scale, Index col,
                                           Index seen) {
  const Floats<V> g = unpack(dy), p = unpack(y);
  Floats<V> dx;
#pragma unroll
  for (int j = 0; j < V; ++j) dx.at[j] = col + j < seen ? p.at[j] * (g.at[j] - dot) * scale : 0.0f;
  return pack<T>(dx);
}

template <typename T, int N, int kBlock, bool kCluster = false>
__global__ void __launch_bounds__(kBlock, kBlock == kClusterThreads && N <= 4 ? 2 : 1)
    softmax_backward_registers(const SoftmaxBackward a) {
  constexpr int V = kVector<T>;
  __shared__ Scratch<kCluster> scratch;
  if constexpr (kCluster) cluster_started();
  auto [row, first, end] = RowColumns<V, kCluster>(a.cols);
  const int cols = row < a.rows ? end : 0;
  const int seen = min(cols, int(visible(row, a.cols, a.queries)));
  const int step = (N >= 4 ? kBlock : blockDim.x) * V;  // as above: two tensors wait in registers
  const T* dy_row = row_by_call<T>(a.dy, row);
  const T* y_row = row_by_call<T>(a.y, row);
  Vec<T, V> dy[N], y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int col = first + i * step;
    dy[i] = col < seen ? load_readonly<V>(dy_row + col) : zeros<T, V>();
    y[i] = col < seen ? load_readonly<V>(y_row + col) : zeros<T, V>();
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += dot(dy[i], y[i], first + i * step, seen);
  if constexpr (kCluster) cluster_wait();
  sum = row_sum(sum, scratch);
  if constexpr (kCluster) forget(first);  // else what was computed from it waits in registers, too

  T* dx = static_cast<T*>(a.dx) + row * a.cols;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int col = first + i * step;
    if (col >= cols) continue;
    keep_packed(dy[i]);
    keep_packed(y[i]);
    store(dx + col, input_gradient(dy[i], y[i], sum, a.scale, col, seen));
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) softmax_backward_loop(const SoftmaxBackward a) {
  __shared__ Scratch<false> scratch;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = row < a.rows;
  const int64_t cols = inside ? a.cols : 0, seen = inside ? visible(row, a.cols, a.queries) : 0;
  const int64_t first = threadIdx.x * V, step = blockDim.x * V;
  const T* dy = row_by_call<T>(a.dy, row);
  const T* y = row_by_call<T>(a.y, row);
  float sum = 0.0f;
  for (int64_t col = first; col < seen; col += step)
    sum += dot(load_readonly<V>(dy + col), load_readonly<V>(y + col), col, seen);
  sum = row_sum(sum, scratch);

  T* dx = static_cast<T*>(a.dx) + row * a.cols;
  for (int64_t col = first; col < cols; col += step) {
    const Vec<T, V> g = col < seen ? load_readonly<V>(dy + col) : zeros<T, V>();
    const Vec<T, V> p = col < seen ? load_readonly<V>(y + col) : zeros<T, V>();
    store(dx + col, input_gradient(g, p, sum, a.scale, col, seen));
  }
}

// ---- launching -----------------------------------------------------------------------------------

// Launches `kernel`, whose threads take up to `per_thread` of a row's `units`, with up to `most` threads to a row.
template <typename Args>
void run(void (*kernel)(Args), const Args& a, int64_t units, int per_thread, int most, cudaStream_t stream) {
  launch_rows(kernel, a, block_for(units, per_thread, kThreads, most), stream);
}

// Whether the mask can be loaded by as many elements as a vector of T has; a 16-byte access at most.
template <typename T>
bool mask_aligned(const Mask& mask) {
  if (mask.kind == MaskKind::none) return true;
  const int64_t element = mask.kind == MaskKind::boolean ? 1 : mask.kind == MaskKind::additive ? sizeof(T) : 4;
  const int64_t bytes = std::min<int64_t>(16, kVector<T> * element);
  return reinterpret_cast<uintptr_t>(mask.data) % bytes == 0 && mask.outer_stride * element % bytes == 0 &&
         mask.middle_stride * element % bytes == 0 && mask.inner_stride * element % bytes == 0;
}

template <typename T, bool kMasked>
void forward(const SoftmaxForward& a, int device, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  constexpr int kMost = kMasked ? 4 : 8;  // vectors of a thread: a mask takes registers beside them
  const bool whole = a.cols % V == 0 && aligned(a.x, sizeof(T)) && aligned(a.y) && mask_aligned<T>(a.mask);
  const int64_t vectors = a.cols / V;
  const auto in_clusters = softmax_forward_registers<T, kMost, kClusterThreads, kMasked, true>;
  if (!whole)
    run(softmax_forward_loop<T, 1, kMasked>, a, a.cols, 8, kMaxThreads, stream);
  else if (vectors <= 1 * kWarp)
    run(softmax_forward_registers<T, 1, kThreads, kMasked>, a, vectors, 1, kThreads, stream);
  else if (vectors <= 2 * kWarp)
    run(softmax_forward_registers<T, 2, kThreads, kMasked>, a, vectors, 2, kThreads, stream);
  else if (vectors <= 4 * kClusterThreads)
    run(softmax_forward_registers<T, 4, kClusterThreads, kMasked>, a, vectors, 4, kClusterThreads, stream);
  else if (vectors <= kMost * kClusterThreads)
    run(softmax_forward_registers<T, kMost, kClusterThreads, kMasked>, a, kMost * kClusterThreads, kMost,
        kClusterThreads, stream);
  else if (!launch_row_clusters(in_clusters, a, vectors, kMost, device, stream))
    run(softmax_forward_loop<T, V, kMasked>, a, vectors, 8, kMaxThreads, stream);
}

template <typename T>
void backward(const SoftmaxBackward& a, int device, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const bool whole = a.cols % V == 0 && aligned(a.dy, sizeof(T)) && aligned(a.y, sizeof(T)) && aligned(a.dx);
  const int64_t vectors = a.cols / V;
  const auto in_clusters = [&](auto kernel, int per_thread) {
    return launch_row_clusters(kernel, a, vectors, per_thread, device, stream);
  };
  if (!whole)
    run(softmax_backward_loop<T, 1>, a, a.cols, 8, kMaxThreads, stream);
  else if (vectors <= kWarp)
    run(softmax_backward_registers<T, 1, kThreads>, a, vectors, 1, kThreads, stream);
  else if (vectors <= 2 * kClusterThreads)
    run(softmax_backward_registers<T, 2, kClusterThreads>, a, vectors, 2, kClusterThreads, stream);
  else if (vectors <= 4 * kClusterThreads)
    run(softmax_backward_registers<T, 4, kClusterThreads>, a, 4 * kClusterThreads, 4, kClusterThreads, stream);
  else if (!in_clusters(softmax_backward_registers<T, 4, kClusterThreads, true>, 4) &&
           !in_clusters(softmax_backward_registers<T, 8, kClusterThreads, true>, 8))
    run(softmax_backward_loop<T, V>, a, vectors, 8, kMaxThreads, stream);
}

}  // namespace softmax

void softmax_forward(const SoftmaxForward& a, int device, cudaStream_t stream) {
  if (a.rows == 0) return;
  DeviceGuard guard(device);
  visit(a.dtype, [&](auto element) {
    using T = decltype(element);
    a.mask.kind == MaskKind::none ? softmax::forward<T, false>(a, device, stream)
                                    : softmax::forward<T, true>(a, device, stream);
  });
}

void softmax_backward(const SoftmaxBackward& a, int device, cudaStream_t stream) {
  if (a.rows == 0) return;
  DeviceGuard guard(device);
  visit(a.dtype, [&](auto element) { softmax::backward<decltype(element)>(a, device, stream); });
}

}  // namespace fastllm::cuda
