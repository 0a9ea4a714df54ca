// The Jensen-Shannon divergence of logits: bound by memory, in 16-byte accesses where rows are aligned to them. A block
// walks along a row of both models (short rows: several to a block) for its log-sum-exps, for the loss and, but for the
// forward KL, whose gradient is written with the loss, for the gradient.

#include "jsd.h"

#include "exp_sum.h"
#include "launch.h"

namespace fastllm::cuda {
namespace jsd_rows {

constexpr int kThreads = 256;  // at most, of a block: three of them fit, with the registers that logarithms take
constexpr int kShort = 128;    // of a block, where rows are short
constexpr int kAhead = 2;      // vectors of each model that a thread loads before it uses them

// e^x - 1 for |x| <= log(2) / 2, as csrc/cpu/simd.h.
__device__ inline float expm1_near(float x) {
  float p = 1.9875691500e-4f;
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  return p * x * x + x;
}

// log(1 + x) for x in [sqrt(1/2) - 1, sqrt(2) - 1], after Cephes.
__device__ inline float log1p_near(float x) {
  float p = 7.0376836292e-2f;
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const float square = x * x;
  return p * x * square - 0.5f * square + x;
}

// log x of positive normal numbers up to 1, of which `less` is x - 1 with all its digits.
__device__ inline float log_below(float x, float less) {
  const bool near = less > -0.29f;
  const uint32_t bits = __float_as_uint(x) + (0x3f800000u - 0x3f3504f3u);  // the exponent grows from sqrt(1/2) on
  const float fraction = __uint_as_float((bits & 0x007fffffu) + 0x3f3504f3u);
  const float n = near ? 0.0f : float(int(bits >> 23) - 127);
  return log1p_near(near ? less : fraction - 1.0f) - n * 2.12194440e-4f + n * 0.693359375f;
}

// The score, rounded as where the log-sum-exp adds it up, less that: in two parts, of which the first may be large.
struct LogProbability {
  float scale, shift, log_sum;

  __device__ LogProbability(const ExpSum<>& row, float scale)
      : scale(scale), shift(row.shift), log_sum(logf(row.sum)) {}
  __device__ float operator()(float logit) const { return __fmul_rn(logit, scale) - shift - log_sum; }
};

// log(q / m) and log(p / m), by d = log(p / q).
struct Ratios {
  float student, teacher;

  __device__ Ratios(float d, const Jsd& a) {
    const bool below = d <= 0.0f;
    const float u = below ? d : -d;
    const float smaller = below ? a.teacher_share : a.student_share, larger = below ? a.student_share : a.teacher_share;
    const float e = expf(u);
    const float less = smaller * (u > -0.34f ? expm1_near(u) : e - 1.0f);
    const float r = log_below(larger + smaller * e, less);
    student = below ? -r : -d - r;
    teacher = below ? d - r : -r;
  }
};

// 0 times infinity is 0 here.
__device__ inline float weighted(float probability, float logarithm) {
  return probability == 0.0f ? 0.0f : probability * logarithm;
}

// Calls body(student, teacher, column) for each vector that this thread takes of a row.
template <int V, typename T, typename Body>
__device__ inline void for_each_pair(const T* student, const T* teacher, int64_t cols, Body body) {
  const int64_t step = blockDim.x * V;
  for (int64_t start = threadIdx.x * V; start < cols; start += kAhead * step) {
    Vec<T, V> s[kAhead], t[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (start + i * step >= cols) continue;
      s[i] = load<V>(student + start + i * step);  // not readonly: the gradient may be written there
      t[i] = load_readonly<V>(teacher + start + i * step);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (start + i * step < cols) body(unpack(s[i]), unpack(t[i]), start + i * step);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3) jsd_kernel(const Jsd a) {
  __shared__ Scratch<false, 2> scratch[2];
  __shared__ Scratch<false> sums[2];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool counts = row < a.rows && (!a.mask || a.mask[row]);
  const int64_t cols = counts ? a.cols : 0;
  const T* student = static_cast<const T*>(a.student) + row * a.cols;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.cols;
  T* dlogits = static_cast<T*>(a.dlogits) + row * a.cols;
  const float scale = a.scale;
  const float dscore = counts && a.dloss ? a.dloss[row * a.dloss_stride] * scale : 0.0f;

  ExpSum<> mine, theirs;
  for_each_pair<V>(student, teacher, cols, [&](Floats<V> s, Floats<V> t, int64_t) {
#pragma unroll
    for (int j = 0; j < V; ++j) s.at[j] = __fmul_rn(s.at[j], scale), t.at[j] = __fmul_rn(t.at[j], scale);
    mine.add(s), theirs.add(t);
  });
  const LogProbability log_q(mine.over_row(scratch[0]), scale), log_p(theirs.over_row(scratch[1]), scale);

  float of_student = 0.0f, of_teacher = 0.0f;
  if (a.teacher_share == 0.0f) {
    for_each_pair<V>(student, teacher, cols, [&](Floats<V> s, const Floats<V>& t, int64_t col) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float lq = log_q(s.at[j]), lp = log_p(t.at[j]), p = expf(lp);
        of_teacher += weighted(p, lp - lq);
        s.at[j] = (expf(lq) - p) * dscore;
      }
      if (dscore != 0.0f) store(dlogits + col, pack<T>(s));
    });
  } else if (a.student_share == 0.0f) {
    for_each_pair<V>(student, teacher, cols, [&](const Floats<V>& s, const Floats<V>& t, int64_t) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float lq = log_q(s.at[j]);
        of_student += weighted(expf(lq), lq - log_p(t.at[j]));
      }
    });
  } else {
    for_each_pair<V>(student, teacher, cols, [&](const Floats<V>& s, const Floats<V>& t, int64_t) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float lq = log_q(s.at[j]), lp = log_p(t.at[j]);
        const Ratios by_mixture(lp - lq, a);
        of_student += weighted(expf(lq), by_mixture.student);
        of_teacher += weighted(expf(lp), by_mixture.teacher);
      }
    });
  }
  of_student = row_sum(of_student, sums[0]);
  of_teacher = row_sum(of_teacher, sums[1]);
  if (row >= a.rows) return;
  if (threadIdx.x == 0) {
    const float mixed = a.teacher_share * of_teacher + a.student_share * of_student;
    const float loss = a.teacher_share == 0.0f ? of_teacher : a.student_share == 0.0f ? of_student : mixed;
    a.loss[row] = counts ? loss : 0.0f;
  }
  if (!a.dlogits) return;

  if (dscore == 0.0f) {  // whatever the logits hold
    for (int64_t col = threadIdx.x * V; col < a.cols; col += blockDim.x * V) store(dlogits + col, zeros<T, V>());
  } else if (a.teacher_share != 0.0f) {
    const float by = a.student_share == 0.0f ? dscore : dscore * a.student_share;
    for_each_pair<V>(student, teacher, cols, [&](Floats<V> s, const Floats<V>& t, int64_t col) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float lq = log_q(s.at[j]), d = log_p(t.at[j]) - lq;
        const float ratio = a.student_share == 0.0f ? -d : Ratios(d, a).student;
        s.at[j] = weighted(expf(lq), ratio - of_student) * by;
      }
      store(dlogits + col, pack<T>(s));
    });
  }
}

}  // namespace jsd_rows

void jsd(const Jsd& a, int device, cudaStream_t stream) {
  using namespace jsd_rows;
  if (a.rows == 0) return;
  DeviceGuard guard(device);
  visit(a.dtype, [&](auto element) {
    using T = decltype(element);
    const bool whole = a.cols % kVector<T> == 0 && aligned(a.student) && aligned(a.teacher) && aligned(a.dlogits);
    const int64_t units = whole ? a.cols / kVector<T> : a.cols;
    launch_rows(whole ? jsd_kernel<T, kVector<T>> : jsd_kernel<T, 1>, a, block_for(units, kAhead, kShort, kThreads),
                stream);
  });
}

}  // namespace fastllm::cuda
