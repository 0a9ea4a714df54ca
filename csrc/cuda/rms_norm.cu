// RMSNorm: bound by memory, so every tensor is read and written once, in 16-byte accesses, and a row waits in
// registers, still packed in its dtype, for its sum; in those of a cluster (kCluster) where a block's do not hold it.
// Sums of the weight's gradient are in shared memory, each thread's in places of its own. Two things need more:
//   - rows too long for a cluster, or not aligned to 16 bytes, are read again, from L2 as long as all of them fit it
//     (…_loop), and once more for the weight's gradient (…_columns);
//   - the blocks' partial sums of the weight's gradient are added up by a last kernel (…_partials).
// A thread holds N vectors of V elements, `threads per row` vectors apart.

#include "rms_norm.h"

#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "ptx.h"
#include "reduce.h"
#include "row.h"
#include "vec.h"

namespace fastllm::cuda {
namespace rms_norm {

// The 1 in __launch_bounds__(…, 1) keeps ptxas from spilling to fit a second block.
constexpr int kForwardThreads = 128;   // of a block, where rows are short
constexpr int kBackwardThreads = 256;  // more rows to a block: fewer rows of workspace

// The arguments, and 1 / cols: a division is a call, round which a row in registers is saved.
template <typename Args>
struct Prepared : Args {
  float inverse_cols;
  explicit Prepared(const Args& a) : Args(a), inverse_cols(1.0f / a.cols) {}
};

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

template <typename T, typename W, int N, bool kCluster = false>
__global__ void __launch_bounds__(N <= 2 ? kForwardThreads : kClusterThreads, N <= 2 ? 1 : 2)
    rms_norm_forward_registers(const Prepared<RmsNormForward> a) {
  constexpr int V = kVector<T>;
  __shared__ Scratch<kCluster> scratch;
  if constexpr (kCluster) cluster_started();
  const auto [row, first, end] = RowColumns<V, kCluster>(a.cols);
  // eight vectors leave no registers for addresses: there they are constants
  const int step = (N == 8 ? kClusterThreads : blockDim.x) * V;
  const int rest = row < a.rows ? end - first : 0;  // a row past the end has no columns

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
  if constexpr (kCluster) cluster_wait();
  const float rstd = rsqrtf(row_sum(sum, scratch) * a.inverse_cols + a.eps);
  if (a.rstd && first == 0 && row < a.rows) a.rstd[row] = rstd;

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
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_forward_loop(const Prepared<RmsNormForward> a) {
  __shared__ Scratch<false> scratch;
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
  const float rstd = rsqrtf(row_sum(sum, scratch) * a.inverse_cols + a.eps);
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

// A block of the backward has one row, and this many threads, where the vectors leave no registers for more.
template <int N>
constexpr bool kOneRow = N >= 4;
template <int N>
__device__ inline int backward_threads() {
  return kOneRow<N> ? kClusterThreads : blockDim.x;
}

// A thread's sums of the weight's gradient, in dynamic shared memory: in words of 16 bytes, a row's threads apart, so
// that a warp meets in no bank. The rows of a block have sums of their own.
template <int N, int V>
struct WeightGradient {
  static constexpr int kWords = V / 4;  // of a vector
  float* mine = dynamic_shared<float>() + (threadIdx.y * N * kWords * blockDim.x + threadIdx.x) * 4;

  static size_t bytes(dim3 block) { return size_t(block.x) * block.y * N * V * sizeof(float); }
  __device__ float* word(int i, int k) const { return mine + (i * kWords + k) * backward_threads<N>() * 4; }

  __device__ void clear() const {
#pragma unroll
    for (int i = 0; i < N * kWords; ++i) store_freely(word(0, i), zeros<float, 4>());
  }
  __device__ void add(int i, const Pairs<V>& p) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      Floats<4> sum = unpack(load<4>(word(i, k)));
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.at[j] += p.dy.at[k * 4 + j] * p.xhat.at[k * 4 + j];
      store_freely(word(i, k), pack<float>(sum));
    }
  }
  __device__ void write(int i, float* out) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) store(out + k * 4, load<4>(word(i, k)));
  }
};

// A block, or cluster, takes every so many-th group of rows, or row, so that it writes one row of the workspace.
template <typename T, typename W, int N, bool kCluster = false>
__global__ void __launch_bounds__(N == 1 ? kBackwardThreads : kClusterThreads,
                                  N == 1 || N == 8 ? 1 : N == 4 ? kTightBlocks : 2)
    rms_norm_backward_registers(const Prepared<RmsNormBackward> a) {
  constexpr int V = kVector<T>;
  __shared__ Scratch<kCluster> scratch[2];
  if constexpr (kCluster) cluster_started();
  auto [first_row, first, end] = RowColumns<V, kCluster>(a.cols);
  const int step = backward_threads<N>() * V;
  const WeightGradient<N, V> dweight;
  if (a.dweight) dweight.clear();
  if constexpr (kCluster) cluster_wait();

  int turn = 0;
  using Index = std::conditional_t<kOneRow<N>, int, int64_t>;  // no memory holds 2^31 rows as long as a block's
  const Index stride = kCluster ? gridDim.x / cluster_size() : Index(gridDim.x) * (kOneRow<N> ? 1 : blockDim.y);
  for (Index row = first_row; (kOneRow<N> ? row : row - threadIdx.y) < Index(a.rows); row += stride) {
    const bool inside = kOneRow<N> || row < a.rows;
    const int rest = inside ? end - first : 0;
    const float rstd = inside ? a.rstd[row] : 0.0f;
    const T* dy_row = row_of<T>(a.dy, row) + first;
    const T* x_row = row_of<T>(a.x, row) + first;
    Vec<T, V> dy[N], x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dy[i] = i * step < rest ? load_readonly<V>(dy_row + i * step) : zeros<T, V>();
      x[i] = i * step < rest ? load_readonly<V>(x_row + i * step) : zeros<T, V>();
    }

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i * step >= rest) continue;
      const Pairs<V> p = pairs(dy[i], x[i], rstd);
      sum += dot(p, factors<W, V>(a.weight, a.weight_offset, first + i * step));
      if (a.dweight) dweight.add(i, p);
    }
    const float mean = row_sum(sum, scratch[turn]) * a.inverse_cols;
    turn ^= 1;

    if constexpr (kOneRow<N>) forget(first);  // else what was computed from it waits in registers, too
    const T* dh = a.dh.data ? row_of<T>(a.dh, row) + first : nullptr;
    T* dx = static_cast<T*>(a.dx) + int64_t(row) * a.cols + first;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i * step >= rest) continue;
      keep_packed(dy[i]);
      keep_packed(x[i]);
      const Floats<V> factor = factors<W, V>(a.weight, a.weight_offset, first + i * step);
      const Pairs<V> p = pairs(dy[i], x[i], rstd);
      store_input_gradient(dx + i * step, input_gradient(p, rstd, mean, factor), dh ? dh + i * step : nullptr);
    }
  }

  if (!a.dweight) return;
  fold_rows(dynamic_shared<float>(), N * V * blockDim.x);
  if (threadIdx.y != 0) return;
  float* out = a.workspace + int64_t(kCluster ? cluster_index() : blockIdx.x) * a.cols;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (first + i * step < end) dweight.write(i, out + first + i * step);
}

template <typename T, typename W, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_backward_loop(const Prepared<RmsNormBackward> a) {
  __shared__ Scratch<false> scratch;
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
  const float mean = row_sum(sum, scratch) * a.inverse_cols;

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
void forward(const RmsNormForward& a, int device, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const bool whole = a.cols % V == 0 && aligned(a.x, sizeof(T)) && aligned(a.residual, sizeof(T)) &&
                     aligned(a.weight) && aligned(a.y) && (!a.residual || aligned(a.h));
  const int64_t vectors = a.cols / V;
  const Prepared prepared(a);
  const auto run = [&](auto kernel, int64_t units, int per_thread) {
    launch_rows(kernel, prepared, block_for(units, per_thread, kForwardThreads), stream);
  };
  if (!whole)
    run(rms_norm_forward_loop<T, W, 1>, a.cols, 8);
  else if (vectors <= 1 * kWarp)
    run(rms_norm_forward_registers<T, W, 1>, vectors, 1);
  else if (vectors <= 2 * kWarp)
    run(rms_norm_forward_registers<T, W, 2>, vectors, 2);
  else if (vectors <= 4 * kClusterThreads)
    run(rms_norm_forward_registers<T, W, 4>, vectors, 4);
  else if (vectors <= 8 * kClusterThreads)
    run(rms_norm_forward_registers<T, W, 8>, 8 * kClusterThreads, 8);
  else if (!launch_row_clusters(rms_norm_forward_registers<T, W, 8, true>, prepared, vectors, 8, device, stream))
    run(rms_norm_forward_loop<T, W, V>, vectors, 8);
}

// How many vectors a thread of the backward takes, where a block holds a row; 0: it does not.
template <typename T>
int backward_vectors(int64_t vectors, int device) {
  if (vectors <= kWarp) return 1;
  if (vectors <= 2 * kClusterThreads) return 2;
  const size_t shared = WeightGradient<4, kVector<T>>::bytes(dim3(kClusterThreads));  // beside what is static
  return vectors <= 4 * kClusterThreads && shared < shared_per_block(device) ? 4 : 0;
}

// Clusters of the backward, of N vectors to a thread, that `device` runs at once; 0: rows are too long for them.
template <typename T, typename W, int N>
int backward_clusters(int64_t vectors, int device) {
  const int size = cluster_for(vectors, N);
  if (size > kMaxCluster) return 0;
  const size_t shared = WeightGradient<N, kVector<T>>::bytes(dim3(kClusterThreads));
  return active_clusters(rms_norm_backward_registers<T, W, N, true>, size, shared, device);
}

template <typename T, typename W, int N, bool kCluster>
void launch_backward(const RmsNormBackward& a, dim3 block, int cluster, cudaStream_t stream) {
  const size_t shared = a.dweight ? WeightGradient<N, kVector<T>>::bytes(block) : 0;
  const int64_t groups = a.dweight ? a.partials : ceil_div(a.rows, block.y);
  launch(rms_norm_backward_registers<T, W, N, kCluster>,
         Launch{dim3(unsigned(groups * cluster)), block, shared, cluster}, stream, Prepared(a));
}

// The block of such a row, or rows.
inline dim3 backward_block(int64_t vectors, int per_thread) {
  return per_thread >= 4 ? dim3(kClusterThreads) : block_for(vectors, per_thread, kBackwardThreads);
}

// False where rows don't fit the registers of a block or cluster.
template <typename T, typename W>
bool backward_in_registers(const RmsNormBackward& a, int64_t vectors, int device, cudaStream_t stream) {
  const int per_thread = backward_vectors<T>(vectors, device);
  const dim3 block = per_thread ? backward_block(vectors, per_thread) : dim3(kClusterThreads);
  if (per_thread == 1)
    launch_backward<T, W, 1, false>(a, block, 1, stream);
  else if (per_thread == 2)
    launch_backward<T, W, 2, false>(a, block, 1, stream);
  else if (per_thread == 4)
    launch_backward<T, W, 4, false>(a, block, 1, stream);
  else if (backward_clusters<T, W, 4>(vectors, device))
    launch_backward<T, W, 4, true>(a, block, cluster_for(vectors, 4), stream);
  else if (backward_clusters<T, W, 8>(vectors, device))
    launch_backward<T, W, 8, true>(a, block, cluster_for(vectors, 8), stream);
  else
    return false;
  return true;
}

template <typename T, typename W>
void backward(const RmsNormBackward& a, int device, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const bool whole = a.cols % V == 0 && aligned(a.dy, sizeof(T)) && aligned(a.x, sizeof(T)) &&
                     aligned(a.dh, sizeof(T)) && aligned(a.weight) && aligned(a.dx) && aligned(a.workspace);
  const int64_t units = whole ? a.cols / V : a.cols;
  if (whole && backward_in_registers<T, W>(a, units, device, stream)) return;
  launch_rows(whole ? rms_norm_backward_loop<T, W, V> : rms_norm_backward_loop<T, W, 1>, Prepared(a),
              block_for(units, 8, kBackwardThreads), stream);
  if (a.dweight) {
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
    rms_norm::forward<decltype(element), decltype(weight)>(a, device, stream);
  });
}

void rms_norm_backward(const RmsNormBackward& a, int device, cudaStream_t stream) {
  DeviceGuard guard(device);
  if (a.rows != 0)
    rms_norm::visit_types(a, [&](auto element, auto weight) {
      rms_norm::backward<decltype(element), decltype(weight)>(a, device, stream);
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
  const int64_t bytes = cols * size_of(dtype), vectors = bytes / 16, sms = sm_count(device);
  const bool whole = bytes % 16 == 0;
  int per_thread = 0;
  int64_t clusters = 0;
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    if (!whole || (per_thread = backward_vectors<T>(vectors, device))) return;
    DeviceGuard guard(device);
    clusters = backward_clusters<T, T, 4>(vectors, device);
    if (!clusters) clusters = backward_clusters<T, T, 8>(vectors, device);
  });
  if (per_thread) {
    const dim3 block = backward_block(vectors, per_thread);
    const int64_t per_sm = std::max<int64_t>(1, kThreadsPerSM / (block.x * block.y));
    return std::min<int64_t>(ceil_div(rows, block.y), per_sm * sms);
  }
  return std::min<int64_t>(clusters ? rows : ceil_div(rows, 8 * kColumnLanes), clusters ? clusters : 8 * sms);
}

}  // namespace fastllm::cuda
