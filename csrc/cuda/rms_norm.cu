// RMSNorm: bound by memory, so every tensor is read and written once, in 16-byte accesses, and a row
// waits in registers, still packed in its dtype, for its sum. Three things need more:
//   - rows too long for the registers, or not aligned to 16 bytes, are read again from L2 (…_loop);
//   - the weight's gradient of rows too long for accumulators reads dy and x again (…_columns);
//   - the blocks' partial sums of the weight's gradient are added up by a last kernel (…_partials).
// A thread holds N vectors of V elements, `threads per row` vectors apart.

#include "rms_norm.h"

#include <algorithm>

#include "launch.h"
#include "ptx.h"
#include "reduce.h"
#include "vec.h"

namespace fastllm::cuda {
namespace rms_norm {

// The 1 in __launch_bounds__(kMaxThreads, 1) keeps ptxas from spilling to fit a second block.
constexpr int kForwardThreads = 128;   // of a block, where rows are short
constexpr int kBackwardThreads = 256;  // more rows to a block: fewer rows of workspace

// 1 / cols, here and not where it is used: a division is a call, round which a row in registers is saved.
__device__ inline float inverse_of(int64_t cols) {
  float inverse = 1.0f / cols;
  forget(inverse);
  return inverse;
}

// weight + weight_offset at the columns from `col` on; 1 without a weight.
template <typename W, int V>
__device__ inline Floats<V> factors(const void* weight, float offset, int64_t col) {
  if (!weight) return filled<V>(1.0f);
  Floats<V> out = unpack(load_readonly<V>(static_cast<const W*>(weight) + col));
#pragma unroll
  for (int j = 0; j < V; ++j) out.at[j] += offset;
  return out;
}

// x + residual as the dtype holds it.
template <typename T, int V>
__device__ inline Vec<T, V> add(const Vec<T, V>& x, const Vec<T, V>& residual) {
  Floats<V> h = unpack(x);
  const Floats<V> r = unpack(residual);
#pragma unroll
  for (int j = 0; j < V; ++j) h.at[j] += r.at[j];
  return pack<T>(h);
}

template <typename T, int V>
__device__ inline float sum_of_squares(const Vec<T, V>& vec) {
  const Floats<V> h = unpack(vec);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j) sum += h.at[j] * h.at[j];
  return sum;
}

template <typename T, int V>
__device__ inline Vec<T, V> scaled(const Vec<T, V>& vec, float rstd, const Floats<V>& factor) {
  Floats<V> y = unpack(vec);
#pragma unroll
  for (int j = 0; j < V; ++j) y.at[j] = y.at[j] * rstd * factor.at[j];
  return pack<T>(y);
}

// ---- forward -------------------------------------------------------------------------------------

template <typename T, typename W, int N>
__global__ void __launch_bounds__(N <= 2 ? kForwardThreads : kMaxThreads, 1)
    rms_norm_forward_registers(const RmsNormForward a) {
  constexpr int V = kVector<T>;
  __shared__ Scratch<false> scratch;
  const float inverse = inverse_of(a.cols);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  // eight vectors leave no registers for addresses: there they are constants
  const int first = threadIdx.x * V, step = (N == 8 ? kMaxThreads : blockDim.x) * V;
  const int rest = row < a.rows ? int(a.cols) - first : 0;  // a row past the end has no columns

  const T* x = row_by_call<T>(a.x, row) + first;
  const T* residual = row_by_call<T>(a.residual, row) + first;
  Vec<T, V> h[N];
#pragma unroll
  for (int i = 0; i < N; ++i) h[i] = i * step < rest ? load_readonly<V>(x + i * step) : zeros<T, V>();
  if (a.residual.data) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i * step < rest) h[i] = add(h[i], load_readonly<V>(residual + i * step));
    T* out = static_cast<T*>(a.h) + row * a.cols + first;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i * step < rest) N == 8 ? store_freely(out + i * step, h[i]) : store(out + i * step, h[i]);
  }

  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += sum_of_squares(h[i]);
  const float rstd = rsqrtf(row_sum(sum, scratch) * inverse + a.eps);
  if (a.rstd && threadIdx.x == 0 && row < a.rows) a.rstd[row] = rstd;

  T* y = static_cast<T*>(a.y) + row * a.cols + first;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    keep_packed(h[i]);
    if (i * step >= rest) continue;
    const Vec<T, V> out = scaled(h[i], rstd, factors<W, V>(a.weight, a.weight_offset, first + i * step));
    N == 8 ? store_freely(y + i * step, out) : store(y + i * step, out);
  }
}

template <typename T, typename W, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_forward_loop(const RmsNormForward a) {
  __shared__ Scratch<false> scratch;
  const float inverse = inverse_of(a.cols);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t cols = row < a.rows ? a.cols : 0;
  const int64_t first = threadIdx.x * V, step = blockDim.x * V;

  const T* h = row_by_call<T>(a.x, row);
  float sum = 0.0f;
  if (a.residual.data) {
    const T* x = h;
    const T* residual = row_by_call<T>(a.residual, row);
    T* out = static_cast<T*>(a.h) + row * a.cols;
    for (int64_t col = first; col < cols; col += step) {
      const Vec<T, V> value = add(load_readonly<V>(x + col), load_readonly<V>(residual + col));
      store(out + col, value);
      sum += sum_of_squares(value);
    }
    h = out;
  } else {
    for (int64_t col = first; col < cols; col += step) sum += sum_of_squares(load<V>(h + col));
  }
  const float rstd = rsqrtf(row_sum(sum, scratch) * inverse + a.eps);
  if (a.rstd && threadIdx.x == 0 && row < a.rows) a.rstd[row] = rstd;

  T* y = static_cast<T*>(a.y) + row * a.cols;
  for (int64_t col = first; col < cols; col += step)
    store(y + col, scaled(load<V>(h + col), rstd, factors<W, V>(a.weight, a.weight_offset, col)));
}

// ---- backward ------------------------------------------------------------------------------------

// dy and xhat of some columns
template <int V>
struct Pairs {
  Floats<V> dy, xhat;
};

template <typename T, int V>
__device__ inline Pairs<V> pairs(const Vec<T, V>& dy, const Vec<T, V>& x, float rstd) {
  Pairs<V> out = {unpack(dy), unpack(x)};
#pragma unroll
  for (int j = 0; j < V; ++j) out.xhat.at[j] *= rstd;
  return out;
}

template <int V>
__device__ inline float dot(const Pairs<V>& p, const Floats<V>& factor) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j) sum += p.dy.at[j] * factor.at[j] * p.xhat.at[j];
  return sum;
}

template <int V>
__device__ inline void accumulate(Floats<V>& dweight, const Pairs<V>& p) {
#pragma unroll
  for (int j = 0; j < V; ++j) dweight.at[j] += p.dy.at[j] * p.xhat.at[j];
}

template <int V>
__device__ inline Floats<V> input_gradient(const Pairs<V>& p, float rstd, float mean, const Floats<V>& factor) {
  Floats<V> dx;
#pragma unroll
  for (int j = 0; j < V; ++j) dx.at[j] = rstd * (p.dy.at[j] * factor.at[j] - p.xhat.at[j] * mean);
  return dx;
}

// Stores dx + dh.
template <typename T, int V>
__device__ inline void store_input_gradient(T* to, Floats<V> dx, const T* dh) {
  if (dh) {
    const Floats<V> added = unpack(load_readonly<V>(dh));
#pragma unroll
    for (int j = 0; j < V; ++j) dx.at[j] += added.at[j];
  }
  store(to, pack<T>(dx));
}

// Accumulators for the weight's gradient fit into the registers beside up to this many vectors.
constexpr int kAccumulated = 2;

// A block takes every gridDim.x-th group of rows, so that it writes one row of the workspace.
template <typename T, typename W, int N>
__global__ void __launch_bounds__(N == 1 ? kBackwardThreads : kMaxThreads, 1)
    rms_norm_backward_registers(const RmsNormBackward a) {
  constexpr int V = kVector<T>;
  constexpr bool kAccumulate = N <= kAccumulated;
  __shared__ Scratch<false> scratch[2];
  const float inverse = inverse_of(a.cols);
  const int first = threadIdx.x * V, step = blockDim.x * V;
  Floats<V> dweight[N];  // takes no registers where it is not used
#pragma unroll
  for (int i = 0; i < N; ++i) dweight[i] = filled<V>(0.0f);

  int turn = 0;
  const int64_t stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t start = int64_t(blockIdx.x) * blockDim.y; start < a.rows; start += stride) {
    const int64_t row = start + threadIdx.y;
    const int cols = row < a.rows ? int(a.cols) : 0;
    const float rstd = row < a.rows ? a.rstd[row] : 0.0f;
    const T* dy_row = row_by_call<T>(a.dy, row);
    const T* x_row = row_by_call<T>(a.x, row);
    Vec<T, V> dy[N], x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int col = first + i * step;
      dy[i] = col < cols ? load_readonly<V>(dy_row + col) : zeros<T, V>();
      x[i] = col < cols ? load_readonly<V>(x_row + col) : zeros<T, V>();
    }

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int col = first + i * step;
      if (col >= cols) continue;
      const Pairs<V> p = pairs(dy[i], x[i], rstd);
      sum += dot(p, factors<W, V>(a.weight, a.weight_offset, col));
      if constexpr (kAccumulate) accumulate(dweight[i], p);
    }
    const float mean = row_sum(sum, scratch[turn]) * inverse;
    turn ^= 1;

    const T* dh = a.dh.data ? row_by_call<T>(a.dh, row) : nullptr;
    T* dx = static_cast<T*>(a.dx) + row * a.cols;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int col = first + i * step;
      if (col >= cols) continue;
      keep_packed(dy[i]);
      keep_packed(x[i]);
      const Floats<V> factor = factors<W, V>(a.weight, a.weight_offset, col);
      const Pairs<V> p = pairs(dy[i], x[i], rstd);
      store_input_gradient(dx + col, input_gradient(p, rstd, mean, factor), dh ? dh + col : nullptr);
    }
  }

  if constexpr (kAccumulate) {
    if (!a.dweight) return;
    const int cols = int(a.cols);
    float* out = a.workspace + int64_t(blockIdx.x) * cols;
    float* sums = dynamic_shared<float>() + threadIdx.y * cols;
    const bool alone = blockDim.y == 1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int col = first + i * step;
      if (col >= cols) continue;
      const auto sum = pack<float>(dweight[i]);
      alone ? store(out + col, sum) : store_freely(sums + col, sum);
    }
    if (alone) return;
    fold_rows(dynamic_shared<float>(), cols);
    if (threadIdx.y != 0) return;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (first + i * step < cols) store(out + first + i * step, load<V>(sums + first + i * step));
  }
}

template <typename T, typename W, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_backward_loop(const RmsNormBackward a) {
  __shared__ Scratch<false> scratch;
  const float inverse = inverse_of(a.cols);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t cols = row < a.rows ? a.cols : 0;
  const int64_t first = threadIdx.x * V, step = blockDim.x * V;
  const float rstd = row < a.rows ? a.rstd[row] : 0.0f;
  const T* dy = row_by_call<T>(a.dy, row);
  const T* x = row_by_call<T>(a.x, row);

  float sum = 0.0f;
  for (int64_t col = first; col < cols; col += step) {
    const Pairs<V> p = pairs(load_readonly<V>(dy + col), load_readonly<V>(x + col), rstd);
    sum += dot(p, factors<W, V>(a.weight, a.weight_offset, col));
  }
  const float mean = row_sum(sum, scratch) * inverse;

  const T* dh = a.dh.data ? row_by_call<T>(a.dh, row) : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.cols;
  for (int64_t col = first; col < cols; col += step) {
    const Floats<V> factor = factors<W, V>(a.weight, a.weight_offset, col);
    const Pairs<V> p = pairs(load_readonly<V>(dy + col), load_readonly<V>(x + col), rstd);
    store_input_gradient(dx + col, input_gradient(p, rstd, mean, factor), dh ? dh + col : nullptr);
  }
}

// ---- the weight's gradient -----------------------------------------------------------------------

constexpr int kColumnLanes = 8;  // rows that a block of the column kernel reads side by side

// Block (x, y) sums the rows of its lanes over 32 vectors of columns into row y of the workspace.
template <typename T, int V>
__global__ void __launch_bounds__(kWarp* kColumnLanes) rms_norm_dweight_columns(const RmsNormBackward a) {
  __shared__ float sums[kColumnLanes][kWarp * V];
  const int64_t start = int64_t(blockIdx.x) * kWarp * V, col = start + threadIdx.x * V;
  Floats<V> dweight = filled<V>(0.0f);
  if (col < a.cols) {
    const int64_t step = int64_t(gridDim.y) * kColumnLanes;
    for (int64_t row = int64_t(blockIdx.y) * kColumnLanes + threadIdx.y; row < a.rows; row += step) {
      const Vec<T, V> dy = load_readonly<V>(row_by_call<T>(a.dy, row) + col);
      const Vec<T, V> x = load_readonly<V>(row_by_call<T>(a.x, row) + col);
      accumulate(dweight, pairs(dy, x, a.rstd[row]));
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) sums[threadIdx.y][threadIdx.x * V + j] = dweight.at[j];
  fold_rows(sums[0], kWarp * V);
  const int mine = threadIdx.y * kWarp + threadIdx.x;
  if (mine < kWarp * V && start + mine < a.cols)
    a.workspace[blockIdx.y * a.cols + start + mine] = sums[0][mine];
}

// A block adds up 32 columns of the workspace, each warp every blockDim.y-th row.
template <typename W>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_dweight_partials(const RmsNormBackward a) {
  __shared__ float sums[kMaxWarps][kWarp];
  const int64_t col = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (col < a.cols)
    for (int64_t row = threadIdx.y; row < a.partials; row += blockDim.y) sum += a.workspace[row * a.cols + col];
  sums[threadIdx.y][threadIdx.x] = sum;
  fold_rows(sums[0], kWarp);
  if (threadIdx.y == 0 && col < a.cols) static_cast<W*>(a.dweight)[col] = from_float<W>(sums[0][threadIdx.x]);
}

// ---- launching -----------------------------------------------------------------------------------

constexpr int kThreadsPerSM = 1024;  // resident with 64 registers each

template <typename T, typename W>
void forward(const RmsNormForward& a, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const bool whole = a.cols % V == 0 && aligned(a.x, sizeof(T)) && aligned(a.residual, sizeof(T)) &&
                     aligned(a.weight) && aligned(a.y) && (!a.residual || aligned(a.h));
  const int64_t vectors = a.cols / V;
  const auto run = [&](auto kernel, int64_t units, int per_thread) {
    launch_rows(kernel, a, block_for(units, per_thread, kForwardThreads), stream);
  };
  if (!whole)
    run(rms_norm_forward_loop<T, W, 1>, a.cols, 8);
  else if (vectors <= 1 * kWarp)
    run(rms_norm_forward_registers<T, W, 1>, vectors, 1);
  else if (vectors <= 2 * kWarp)
    run(rms_norm_forward_registers<T, W, 2>, vectors, 2);
  else if (vectors <= 4 * kMaxThreads)
    run(rms_norm_forward_registers<T, W, 4>, vectors, 4);
  else if (vectors <= 8 * kMaxThreads)
    run(rms_norm_forward_registers<T, W, 8>, 8 * kMaxThreads, 8);
  else
    run(rms_norm_forward_loop<T, W, V>, vectors, 8);
}

// Block of the backward that accumulates the weight's gradient; no threads where rows are too long.
inline dim3 accumulating_block(int64_t vectors) {
  if (vectors <= kWarp) return block_for(vectors, 1, kBackwardThreads);
  if (vectors <= kAccumulated * kMaxThreads) return block_for(vectors, kAccumulated, kBackwardThreads);
  return dim3(0);
}

template <typename T, typename W>
void backward(const RmsNormBackward& a, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const bool whole = a.cols % V == 0 && aligned(a.dy, sizeof(T)) && aligned(a.x, sizeof(T)) &&
                     aligned(a.dh, sizeof(T)) && aligned(a.weight) && aligned(a.dx) && aligned(a.workspace);
  const int64_t vectors = a.cols / V;
  const dim3 block = whole ? accumulating_block(vectors) : dim3(0);
  if (block.x != 0) {
    const auto kernel = vectors <= kWarp ? rms_norm_backward_registers<T, W, 1>
                                         : rms_norm_backward_registers<T, W, kAccumulated>;
    const int64_t blocks = a.dweight ? a.partials : ceil_div(a.rows, block.y);
    const size_t shared = a.dweight && block.y > 1 ? block.y * a.cols * sizeof(float) : 0;
    launch(kernel, dim3(unsigned(blocks)), block, shared, stream, a);
    return;
  }

  if (!whole)
    launch_rows(rms_norm_backward_loop<T, W, 1>, a, block_for(a.cols, 8, kBackwardThreads), stream);
  else if (vectors <= 4 * kMaxThreads)
    launch_rows(rms_norm_backward_registers<T, W, 4>, a, block_for(vectors, 4, kBackwardThreads), stream);
  else
    launch_rows(rms_norm_backward_loop<T, W, V>, a, block_for(vectors, 8, kBackwardThreads), stream);
  if (a.dweight) {
    const int64_t units = whole ? vectors : a.cols;
    const dim3 grid(unsigned(ceil_div(units, kWarp)), unsigned(a.partials));
    const auto kernel = whole ? rms_norm_dweight_columns<T, V> : rms_norm_dweight_columns<T, 1>;
    launch(kernel, grid, dim3(kWarp, kColumnLanes), 0, stream, a);
  }
}

// Calls f with values of the element type and of the weight's type.
template <typename Args, typename F>
void visit_types(const Args& a, F f) {
  visit(a.dtype, [&](auto element) {
    if (a.weight_dtype == a.dtype)
      f(element, element);
    else
      f(element, float());
  });
}

}  // namespace rms_norm

void rms_norm_forward(const RmsNormForward& a, int device, cudaStream_t stream) {
  if (a.rows == 0) return;
  DeviceGuard guard(device);
  rms_norm::visit_types(a, [&](auto element, auto weight) {
    rms_norm::forward<decltype(element), decltype(weight)>(a, stream);
  });
}

void rms_norm_backward(const RmsNormBackward& a, int device, cudaStream_t stream) {
  DeviceGuard guard(device);
  if (a.rows != 0)
    rms_norm::visit_types(a, [&](auto element, auto weight) {
      rms_norm::backward<decltype(element), decltype(weight)>(a, stream);
    });
  if (a.dweight)  // no rows, no partials: writes zeros
    visit(a.weight_dtype, [&](auto weight) {
      const dim3 block(kWarp, unsigned(std::clamp<int64_t>(a.partials, 1, kMaxWarps)));
      const dim3 grid(unsigned(ceil_div(a.cols, kWarp)));
      launch(rms_norm::rms_norm_dweight_partials<decltype(weight)>, grid, block, 0, stream, a);
    });
}

int64_t rms_norm_partials(int64_t rows, int64_t cols, DType dtype, int device) {
  using namespace rms_norm;
  const int64_t bytes = cols * size_of(dtype), sms = sm_count(device);
  const dim3 block = bytes % 16 == 0 ? accumulating_block(bytes / 16) : dim3(0);
  if (block.x == 0) return std::min<int64_t>(ceil_div(rows, 8 * kColumnLanes), 8 * sms);
  const int64_t per_sm = std::max<int64_t>(1, kThreadsPerSM / (block.x * block.y));
  return std::min<int64_t>(ceil_div(rows, block.y), per_sm * sms);
}

}  // namespace fastllm::cuda
