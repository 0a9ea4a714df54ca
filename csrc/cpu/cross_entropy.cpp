// Cross-entropy on CPUs: one read of the logits forward, one read and one write of them backward.
#include "../cross_entropy.h"

#include "kernels.h"
#include "memory.h"
#include "online.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

const float kNaN = __builtin_nanf("");

// The scores are the logits, or capped ones; slope is what their derivative is.
struct Scored {
  vfloat score, slope;
};

template <bool kCapped>
struct Cap {
  float cap, inverse;

  explicit Cap(float softcap) : cap(softcap), inverse(kCapped ? 1.f / softcap : 0.f) {}

  Scored operator()(vfloat logit) const {
    if constexpr (!kCapped) return {logit, broadcast(1.f)};
    const vfloat t = tanh(logit * inverse);
    return {settled(t * cap), 1.f - t * t};
  }
};

// What the target of a row says.
struct Target {
  bool ignored, valid, here;  // here: its logit is one of these columns
  int64_t col;
  float own;    // (1 - e) * w_t
  float total;  // own + e * mean weight

  Target(const CrossEntropy& a, int64_t r) {
    const int64_t t = a.target[r];
    ignored = t == a.ignore_index;
    valid = !ignored && t >= 0 && t < a.classes;
    col = valid ? t - a.first_class : -1;
    here = col >= 0 && col < a.cols;
    own = !valid ? kNaN : (1.f - a.label_smoothing) * (a.class_weight ? a.class_weight[t] : 1.f);
    total = own + a.label_smoothing * (a.mean_weight ? *a.mean_weight : 1.f);
  }
};

template <typename T>
inline vfloat only(const T* p) {  // one element, in every lane
  return broadcast(load_partial(p, 1)[0]);
}

template <typename T, bool kCapped>
void forward(const CrossEntropyForward& a) {
  const Cap<kCapped> capped(a.softcap);
  const float spread = a.label_smoothing / static_cast<float>(a.classes);
  const float* weights = a.class_weight ? a.class_weight + a.first_class : nullptr;
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* logits = row<T>(a.logits, r);
    const ExpSum found = exp_sum(a.cols, [&](auto at) { return capped(at(logits)).score; });
    const float lse = found.shift() + __builtin_logf(found.sum());
    a.lse[r] = lse;
    const Target target(a, r);
    if (target.ignored) {
      a.loss[r] = 0.f;
      continue;
    }
    float linear = target.here ? target.own * capped(only(logits + target.col)).score[0] : target.own * 0.f;
    if (spread != 0.f) {
      linear += spread * sum_over(a.cols, [&](auto at, auto) {
                  const vfloat s = capped(at(logits)).score;
                  return weights ? s * at(weights) : s;
                });
    }
    const bool whole = a.cols == a.classes;
    a.loss[r] = whole ? target.total * lse - linear + a.z_loss * lse * lse : linear;
  }
}

template <typename T, bool kCapped>
void backward(const CrossEntropyBackward& a) {
  const Cap<kCapped> capped(a.softcap);
  const float* weights = a.class_weight ? a.class_weight + a.first_class : nullptr;
  T* out = static_cast<T*>(a.dlogits);
  expect_large_write(out, a.rows * a.cols * static_cast<int64_t>(sizeof(T)));
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* logits = row<T>(a.logits, r);
    T* dlogits = out + r * a.cols;
    const Target target(a, r);
    const float lse = a.lse[r], dlse = a.dlse ? a.dlse[r] : 0.f;
    const float dloss = a.dloss && !target.ignored ? a.dloss[r * a.dloss_stride] : 0.f;
    const float push = target.ignored ? dlse : dloss * (target.total + 2.f * a.z_loss * lse) + dlse;
    const float pull = dloss * a.label_smoothing / static_cast<float>(a.classes);
    if (push == 0.f && dloss == 0.f) {
      std::memset(static_cast<void*>(dlogits), 0, a.cols * sizeof(T));
      continue;
    }
    const auto gradient = [&](vfloat logit, vfloat weight) {
      const Scored s = capped(logit);
      return (exp(s.score - lse) * push - weight * pull) * s.slope;
    };
    const vfloat logit = target.here ? only(logits + target.col) : vfloat{};  // before it is overwritten
    if (weights && pull != 0.f)
      for_each_vector(a.cols, [&](auto at, auto put) { put(dlogits, gradient(at(logits), at(weights))); });
    else
      for_each_vector(a.cols, [&](auto at, auto put) { put(dlogits, gradient(at(logits), broadcast(1.f))); });
    if (target.here) {
      const vfloat weight = broadcast(weights ? weights[target.col] : 1.f);
      const vfloat pulled = gradient(logit, weight) - capped(logit).slope * (dloss * target.own);
      store_partial(dlogits + target.col, pulled, 1);
    }
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    return a.softcap == 0.f ? forward<T, false>(a) : forward<T, true>(a);
  });
}

void cross_entropy_backward(const CrossEntropyBackward& a) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    return a.softcap == 0.f ? backward<T, false>(a) : backward<T, true>(a);
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
