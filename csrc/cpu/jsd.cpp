// The Jensen-Shannon divergence of logits on CPUs. A row of both models is read for its log-sum-exps, for the loss and,
// but for the forward KL, whose gradient is written with the loss, for the gradient: from the cache, but the first time.
#include "../jsd.h"

#include "kernels.h"
#include "online.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// log(1 + x) for x in [sqrt(1/2) - 1, sqrt(2) - 1], after Cephes.
inline vfloat log1p_near(vfloat x) {
  vfloat p = broadcast(7.0376836292e-2f);
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const vfloat square = x * x;
  return p * x * square - 0.5f * square + x;
}

// log x of positive normal numbers up to 1, of which `less` is x - 1 with all its digits.
inline vfloat log_below(vfloat x, vfloat less) {
  const vuint32 bits = (vuint32)x + (0x3f800000u - 0x3f3504f3u);  // the exponent grows from sqrt(1/2) on
  const vfloat fraction = (vfloat)((bits & 0x007fffffu) + 0x3f3504f3u);
  const vfloat exponent = __builtin_convertvector((vint32)(bits >> 23) - 127, vfloat);
  const vfloat n = less > -0.29f ? vfloat{} : exponent;
  return log1p_near(less > -0.29f ? less : fraction - 1.f) - n * 2.12194440e-4f + n * 0.693359375f;
}

// The score of a model at a place, less the row's log-sum-exp: in two parts, of which the first may be large. The score
// is rounded as where it is added up.
struct LogProbability {
  float scale, shift, log_sum;

  template <typename T>
  LogProbability(const T* logits, int64_t cols, float scale) : scale(scale) {
    const auto found = exp_sum(cols, [&](auto at) { return settled(at(logits) * scale); });
    shift = found.shift();
    log_sum = __builtin_logf(found.sum());
  }

  vfloat operator()(vfloat logits) const { return settled(logits * scale) - shift - log_sum; }
};

struct Mixture {
  float teacher_share, student_share;

  // log(q / m), by d = log(p / q)
  struct Ratios {
    vfloat student, teacher;
  };
  Ratios operator()(vfloat d) const {
    const vfloat none{}, above = maximum(none, d), below = maximum(none, -d);
    const vfloat u = -maximum(above, below);
    const vfloat smaller = d <= 0.f ? broadcast(teacher_share) : broadcast(student_share);
    const vfloat larger = d <= 0.f ? broadcast(student_share) : broadcast(teacher_share);
    const vfloat e = exp(u);
    const vfloat less = smaller * (u > -0.34f ? expm1_polynomial(u) : e - 1.f);
    const vfloat r = log_below(larger + smaller * e, less);
    return {-above - r, -below - r};
  }
};

// 0 times infinity is 0 here.
inline vfloat weighted(vfloat probability, vfloat logarithm) {
  return probability == 0.f ? vfloat{} : probability * logarithm;
}

// Calls body(student, teacher, put) for each vector of a row; beyond its end the logits are -inf.
template <typename T, typename Body>
inline __attribute__((always_inline)) void for_each_pair(const T* student, const T* teacher, int64_t cols,
                                                         Body&& body) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes)
    body(load(student + j), load(teacher + j), [j](T* p, vfloat v) { store(p + j, v); });
  if (const int64_t rest = cols - j) {
    const auto partial = [j, rest](const T* p) {
      return first_lanes(load_partial(p + j, rest), rest, -__builtin_inff());
    };
    body(partial(student), partial(teacher), [j, rest](T* p, vfloat v) { store_partial(p + j, v, rest); });
  }
}

template <typename T>
void jsd_rows(const Jsd& a) {
  const bool forward = a.teacher_share == 0.f, reverse = a.student_share == 0.f;
  const Mixture mixture{a.teacher_share, a.student_share};
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements / 4)
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* student = static_cast<const T*>(a.student) + r * a.cols;
    const T* teacher = static_cast<const T*>(a.teacher) + r * a.cols;
    T* dlogits = a.dlogits ? static_cast<T*>(a.dlogits) + r * a.cols : nullptr;
    const bool counts = !a.mask || a.mask[r];
    const float dscore = counts && a.dloss ? a.dloss[r * a.dloss_stride] * a.scale : 0.f;
    const bool written = dlogits && dscore != 0.f;
    if (!counts) {
      a.loss[r] = 0.f;
    } else {
      const LogProbability log_q(student, a.cols, a.scale), log_p(teacher, a.cols, a.scale);
      LongSum of_student, of_teacher;
      if (forward) {
        for_each_pair(student, teacher, a.cols, [&](vfloat s, vfloat t, auto put) {
          const vfloat lq = log_q(s), lp = log_p(t), p = exp(lp);
          of_teacher.add(weighted(p, lp - lq));
          if (written) put(dlogits, (exp(lq) - p) * dscore);
        });
        a.loss[r] = sum(of_teacher.value());
      } else if (reverse) {
        for_each_pair(student, teacher, a.cols, [&](vfloat s, vfloat t, auto) {
          const vfloat lq = log_q(s);
          of_student.add(weighted(exp(lq), lq - log_p(t)));
        });
        const float loss = a.loss[r] = sum(of_student.value());
        if (written)
          for_each_pair(student, teacher, a.cols, [&](vfloat s, vfloat t, auto put) {
            const vfloat lq = log_q(s);
            put(dlogits, weighted(exp(lq), lq - log_p(t) - loss) * dscore);
          });
      } else {
        for_each_pair(student, teacher, a.cols, [&](vfloat s, vfloat t, auto) {
          const vfloat lq = log_q(s), lp = log_p(t);
          const auto by_mixture = mixture(lp - lq);
          of_student.add(weighted(exp(lq), by_mixture.student));
          of_teacher.add(weighted(exp(lp), by_mixture.teacher));
        });
        const float k = sum(of_student.value());
        a.loss[r] = a.teacher_share * sum(of_teacher.value()) + a.student_share * k;
        if (written)
          for_each_pair(student, teacher, a.cols, [&](vfloat s, vfloat t, auto put) {
            const vfloat lq = log_q(s);
            const vfloat ratio = mixture(log_p(t) - lq).student;
            put(dlogits, weighted(exp(lq), ratio - k) * (dscore * a.student_share));
          });
      }
    }
    if (dlogits && !written) std::memset(static_cast<void*>(dlogits), 0, a.cols * sizeof(T));
  }
}

}  // namespace

void jsd(const Jsd& a) {
  with_type(a.dtype, [&](auto tag) { jsd_rows<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
