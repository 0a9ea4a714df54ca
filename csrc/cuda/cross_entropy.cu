// Cross-entropy: bound by memory, one read of the logits forward, one read and one write backward, in 16-byte
// accesses where rows are aligned to them. A block walks along a row (short rows: several to a block), some
// vectors ahead. Where rows are too few for all multiprocessors, several blocks share one: backward any, forward those
// of a cluster (kCluster), which tell each other their sums. kPlain: no softcap, scale or label smoothing, whose
// registers the common case is spared.

#include "cross_entropy.h"

#include <algorithm>
#include <limits>

#include "exp_sum.h"
#include "launch.h"

namespace fastllm::cuda {
namespace cross_entropy {

constexpr int kThreads = 512;  // at most, of a block: two of them fit, and one works while the other ends a row
constexpr int kShort = 128;    // of a block, where rows are short
constexpr int kAhead = 4;      // vectors that a thread loads before it uses them

// The arguments, and quotients of them.
template <typename Args>
struct Prepared : Args {
  int64_t share;  // columns of a row that a block has
  float inverse_softcap, scaled_softcap, smoothing_of_class;

  // At most the largest float, for 0 * inf would be NaN.
  Prepared(const Args& a, int64_t share)
      : Args(a),
        share(share),
        inverse_softcap(std::min(1.0f / a.softcap, std::numeric_limits<float>::max())),
        scaled_softcap(a.softcap * a.scale),
        smoothing_of_class(a.label_smoothing / a.classes) {}
};

// A score, and its derivative with respect to the logit but for the scale.
struct Scored {
  float score, slope;
};

template <bool kPlain, typename Args>
__device__ inline Scored scored(float logit, const Args& a) {
  if (kPlain) return {logit, 1.0f};
  if (a.softcap == 0.0f) return {logit * a.scale, 1.0f};
  const float t = tanhf(logit * a.inverse_softcap);
  return {a.scaled_softcap * t, 1.0f - t * t};
}

// What the target of a row says.
struct Target {
  bool ignored;
  int64_t col;       // its column here, or -1
  float own, total;  // (1 - e) * w_t, and that + e * mean weight; NaN where it is out of range

  __device__ Target(const CrossEntropy& a, int64_t row) {
    const int64_t t = a.target[row];
    ignored = t == a.ignore_index;
    const bool valid = !ignored && t >= 0 && t < a.classes;
    col = valid && t >= a.first_class && t < a.first_class + a.cols ? t - a.first_class : -1;
    own = valid ? (1.0f - a.label_smoothing) * (a.class_weight ? a.class_weight[t] : 1.0f) : NAN;
    total = own + a.label_smoothing * (a.mean_weight ? *a.mean_weight : 1.0f);
  }
};

template <typename T, int V, bool kPlain, bool kEntropy, bool kCluster = false>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_forward_rows(const Prepared<CrossEntropyForward> a) {
  __shared__ Scratch<kCluster, kEntropy ? 3 : 2> scratch;
  __shared__ Scratch<kCluster> spread_scratch;
  if constexpr (kCluster) cluster_started();
  const int64_t row = kCluster ? cluster_index() : int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t begin = kCluster ? cluster_rank() * a.share : 0;
  const int64_t cols = row < a.rows ? min(begin + a.share, a.cols) : 0;
  const int64_t step = blockDim.x * V;
  const T* logits = row_of<T>(a.logits, row);
  const float* weight = a.class_weight ? a.class_weight + a.first_class : nullptr;

  ExpSum<kEntropy> mine;
  float spread = 0.0f;  // sum of w_j * s_j
  for (int64_t start = begin + threadIdx.x * V; start < cols; start += kAhead * step) {
    Vec<T, V> read[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (start + i * step < cols) read[i] = load_readonly<V>(logits + start + i * step);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t col = start + i * step;
      if (col >= cols) continue;
      Floats<V> s = unpack(read[i]);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        s.at[j] = scored<kPlain>(s.at[j], a).score;
        if (!kPlain && a.label_smoothing != 0.0f) spread += weight ? s.at[j] * weight[col + j] : s.at[j];
      }
      mine.add(s);
    }
  }
  if constexpr (kCluster) cluster_wait();
  const ExpSum<kEntropy> found = mine.over_row(scratch);
  if constexpr (!kPlain) spread = row_sum(spread, spread_scratch);
  if (begin + threadIdx.x != 0 || row >= a.rows) return;

  const float log_sum = logf(found.sum), lse = found.shift + log_sum;
  const Target target(a, row);
  float linear = 0.0f;
  if (target.col >= 0) linear = scored<kPlain>(to_float(logits[target.col]), a).score;
  linear *= target.own;
  if (!kPlain && a.label_smoothing != 0.0f) linear += a.smoothing_of_class * spread;
  const float loss = a.cols == a.classes ? target.total * lse - linear + a.z_loss * lse * lse : linear;
  a.loss[row] = target.ignored ? 0.0f : loss;
  a.lse[row] = lse;
  if constexpr (kEntropy) a.entropy[row] = target.ignored ? 0.0f : log_sum - found.moment / found.sum;
}

template <typename T, int V, bool kPlain, bool kEntropy>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_backward_rows(const Prepared<CrossEntropyBackward> a) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const int64_t begin = blockIdx.y * a.share, end = min(begin + a.share, a.cols);
  const int64_t step = blockDim.x * V;
  const T* logits = row_of<T>(a.logits, row);
  T* dlogits = static_cast<T*>(a.dlogits) + row * a.cols;
  const float* weight = a.class_weight ? a.class_weight + a.first_class : nullptr;

  const Target target(a, row);
  // the gradients of the results, times the scale
  const float scale = kPlain ? 1.0f : a.scale;
  const float lse = a.lse[row], dlse = a.dlse ? scale * a.dlse[row] : 0.0f;
  const float dloss = a.dloss && !target.ignored ? scale * a.dloss[row * a.dloss_stride] : 0.0f;
  const float dentropy = kEntropy && !target.ignored ? scale * a.dentropy[row] : 0.0f;
  float push = target.ignored ? dlse : dloss * (target.total + 2.0f * a.z_loss * lse) + dlse;
  if constexpr (kEntropy) push -= dentropy * a.entropy[row];
  const float pull = kPlain ? 0.0f : dloss * a.smoothing_of_class;
  const bool nothing = push == 0.0f && dloss == 0.0f && dentropy == 0.0f;  // whatever the logits hold

  for (int64_t start = begin + threadIdx.x * V; start < end; start += kAhead * step) {
    Vec<T, V> read[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)  // not readonly: dlogits may be the logits
      if (start + i * step < end && !nothing) read[i] = load<V>(logits + start + i * step);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t col = start + i * step;
      if (col >= end) continue;
      Floats<V> d = filled<V>(0.0f);
      if (!nothing) {
        d = unpack(read[i]);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const Scored s = scored<kPlain>(d.at[j], a);
          const float log_p = s.score - lse;
          float g = expf(log_p) * (kEntropy ? push - dentropy * bounded(log_p) : push);
          if (col + j == target.col) g -= dloss * target.own;
          if (!kPlain) g -= weight && pull != 0.0f ? pull * weight[col + j] : pull;
          d.at[j] = g * s.slope;
        }
      }
      store(dlogits + col, pack<T>(d));
    }
  }
}

// Calls f with the element type, whether the common case will do, and whether there is an entropy.
template <typename F>
void visit_types(const CrossEntropy& a, bool entropy, F f) {
  const bool plain = a.softcap == 0.0f && a.scale == 1.0f && a.label_smoothing == 0.0f;
  visit(a.dtype, [&](auto element) {
    if (entropy)
      f(element, std::false_type(), std::true_type());
    else if (plain)
      f(element, std::true_type(), std::false_type());
    else
      f(element, std::false_type(), std::false_type());
  });
}

// The blocks that share a row: 2^n, up to `most`, by which all multiprocessors are used, and all threads.
inline int blocks_of_row(int64_t rows, int64_t units, int most, int device) {
  int blocks = 1;
  while (blocks < most && 2 * blocks * rows <= 2 * sm_count(device) && 2 * blocks * kThreads <= units) blocks *= 2;
  return blocks;
}

// How a row is cut: into vectors of V or elements, over blocks.
template <int V>
struct Cut {
  bool whole;
  int64_t cols;

  int64_t units() const { return whole ? cols / V : cols; }
  int64_t share(int blocks) const {
    const int64_t unit = kWarp * (whole ? V : 1);
    return blocks == 1 ? cols : ceil_div(cols, unit * blocks) * unit;
  }
  dim3 block(int blocks) const { return blocks == 1 ? block_for(units(), kAhead, kShort, kThreads) : dim3(kThreads); }
};

template <typename T>
Cut<kVector<T>> cut_row(const CrossEntropy& a) {
  return {a.cols % kVector<T> == 0 && aligned(a.logits, sizeof(T)), a.cols};
}

template <typename T, bool kPlain, bool kEntropy>
void forward(const CrossEntropyForward& a, int device, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const auto cut = cut_row<T>(a);
  const auto in_clusters = cross_entropy_forward_rows<T, V, kPlain, kEntropy, true>;
  int blocks = cut.whole ? blocks_of_row(a.rows, cut.units(), kMaxCluster, device) : 1;
  while (blocks > 1 && active_clusters(in_clusters, blocks, 0, device) == 0) blocks /= 2;
  const Prepared prepared(a, cut.share(blocks));
  const dim3 block = cut.block(blocks);
  if (blocks > 1)
    launch(in_clusters, Launch{dim3(unsigned(a.rows * blocks)), block, 0, blocks}, stream, prepared);
  else
    launch_rows(cut.whole ? cross_entropy_forward_rows<T, V, kPlain, kEntropy>
                          : cross_entropy_forward_rows<T, 1, kPlain, kEntropy>,
                prepared, block, stream);
}

template <typename T, bool kPlain, bool kEntropy>
void backward(const CrossEntropyBackward& a, int device, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  auto cut = cut_row<T>(a);
  cut.whole = cut.whole && aligned(a.dlogits);
  const int blocks = blocks_of_row(a.rows, cut.units(), 2 * sm_count(device), device);
  const dim3 block = cut.block(blocks), grid(unsigned(ceil_div(a.rows, block.y)), unsigned(blocks));
  launch(cut.whole ? cross_entropy_backward_rows<T, V, kPlain, kEntropy>
                   : cross_entropy_backward_rows<T, 1, kPlain, kEntropy>,
         grid, block, 0, stream, Prepared(a, cut.share(blocks)));
}

}  // namespace cross_entropy

void cross_entropy_forward(const CrossEntropyForward& a, int device, cudaStream_t stream) {
  using namespace cross_entropy;
  if (a.rows == 0) return;
  DeviceGuard guard(device);
  visit_types(a, a.entropy != nullptr, [&](auto element, auto plain, auto entropy) {
    forward<decltype(element), plain, entropy>(a, device, stream);
  });
}

void cross_entropy_backward(const CrossEntropyBackward& a, int device, cudaStream_t stream) {
  using namespace cross_entropy;
  if (a.rows == 0) return;
  DeviceGuard guard(device);
  visit_types(a, a.dentropy != nullptr, [&](auto element, auto plain, auto entropy) {
    backward<decltype(element), plain, entropy>(a, device, stream);
  });
}

}  // namespace fastllm::cuda
