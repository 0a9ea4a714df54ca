// Cross-entropy on CPUs: one read of the logits forward, one read and one write of them backward.
#include "../cross_entropy.h"

#include "kernels.h"
#include "memory.h"
#include "online.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

const float kNaN = __builtin_nanf("");

// The scores are the logits, scaled, or capped and scaled; scale times slope is their derivative.
struct Scored {
  vfloat score, slope;
};

enum class Scores { kPlain, kScaled, kCapped };

template <Scores kScores>
struct Scorer {
  float factor, inverse;

  explicit Scorer(const CrossEntropy& a)
      : factor(kScores == Scores::kCapped ? a.softcap * a.scale : a.scale), inverse(1.f / a.softcap) {}

  Scored operator()(vfloat logit) const {
    if constexpr (kScores == Scores::kPlain) return {logit, broadcast(1.f)};
    if constexpr (kScores == Scores::kScaled) return {settled(logit * factor), broadcast(1.f)};
    const vfloat t = tanh(logit * inverse);
    return {settled(t * factor), 1.f - t * t};
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

template <typename T, Scores kScores, bool kEntropy>
void forward(const CrossEntropyForward& a) {
  const Scorer<kScores> scored(a);
  const float spread = a.label_smoothing / static_cast<float>(a.classes);
  const float* weights = a.class_weight ? a.class_weight + a.first_class : nullptr;
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* logits = row<T>(a.logits, r);
    const auto found = exp_sum<kEntropy>(a.cols, [&](auto at) { return scored(at(logits)).score; });
    const float sum = found.sum(), log_sum = __builtin_logf(sum), lse = found.shift() + log_sum;
    a.lse[r] = lse;
    const Target target(a, r);
    if constexpr (kEntropy) a.entropy[r] = target.ignored ? 0.f : log_sum - found.moment() / sum;
    if (target.ignored) {
      a.loss[r] = 0.f;
      continue;
    }
    float linear = target.here ? target.own * scored(only(logits + target.col)).score[0] : target.own * 0.f;
    if (spread != 0.f) {
      linear += spread * sum_over(a.cols, [&](auto at, auto) {
                  const vfloat s = scored(at(logits)).score;
                  return weights ? s * at(weights) : s;
                });
    }
    const bool whole = a.cols == a.classes;
    a.loss[r] = whole ? target.total * lse - linear + a.z_loss * lse * lse : linear;
  }
}

template <typename T, Scores kScores, bool kEntropy>
void backward(const CrossEntropyBackward& a) {
  const Scorer<kScores> scored(a);
  const float* weights = a.class_weight ? a.class_weight + a.first_class : nullptr;
  T* out = static_cast<T*>(a.dlogits);
  expect_large_write(out, a.rows * a.cols * static_cast<int64_t>(sizeof(T)));
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* logits = row<T>(a.logits, r);
    T* dlogits = out + r * a.cols;
    const Target target(a, r);
    // the gradients of the results, times the scale
    const float lse = a.lse[r], dlse = a.dlse ? a.scale * a.dlse[r] : 0.f;
    const float dloss = a.dloss && !target.ignored ? a.scale * a.dloss[r * a.dloss_stride] : 0.f;
    const float dentropy = kEntropy && !target.ignored ? a.scale * a.dentropy[r] : 0.f;
    float push = target.ignored ? dlse : dloss * (target.total + 2.f * a.z_loss * lse) + dlse;
    if constexpr (kEntropy) push -= dentropy * a.entropy[r];
    const float pull = dloss * a.label_smoothing / static_cast<float>(a.classes);
    if (push == 0.f && dloss == 0.f && dentropy == 0.f) {
      std::memset(static_cast<void*>(dlogits), 0, a.cols * sizeof(T));
      continue;
    }
    const auto gradient = [&](vfloat logit, vfloat weight) {
      const Scored s = scored(logit);
      const vfloat log_p = s.score - lse;
      vfloat by = broadcast(push);
      if constexpr (kEntropy) by -= bounded(log_p) * dentropy;
      return (exp(log_p) * by - weight * pull) * s.slope;
    };
    const vfloat logit = target.here ? only(logits + target.col) : vfloat{};  // before it is overwritten
    if (weights && pull != 0.f)
      for_each_vector(a.cols, [&](auto at, auto put) { put(dlogits, gradient(at(logits), at(weights))); });
    else
      for_each_vector(a.cols, [&](auto at, auto put) { put(dlogits, gradient(at(logits), broadcast(1.f))); });
    if (target.here) {
      const vfloat weight = broadcast(weights ? weights[target.col] : 1.f);
      const vfloat pulled = gradient(logit, weight) - scored(logit).slope * (dloss * target.own);
      store_partial(dlogits + target.col, pulled, 1);
    }
  }
}

template <Scores kScores>
using Kind = std::integral_constant<Scores, kScores>;

// Calls f with the element type, the kind of scores, and whether there is an entropy, which takes longer than a scale.
template <typename F>
void visit(const CrossEntropy& a, bool entropy, F&& f) {
  const bool capped = a.softcap != 0.f, scaled = a.scale != 1.f;
  with_type(a.dtype, [&](auto tag) {
    if (entropy && capped) return f(tag, Kind<Scores::kCapped>(), std::true_type());
    if (entropy) return f(tag, Kind<Scores::kScaled>(), std::true_type());
    if (capped) return f(tag, Kind<Scores::kCapped>(), std::false_type());
    if (scaled) return f(tag, Kind<Scores::kScaled>(), std::false_type());
    f(tag, Kind<Scores::kPlain>(), std::false_type());
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a) {
  visit(a, a.entropy, [&](auto tag, auto scores, auto entropy) { forward<decltype(tag), scores, entropy>(a); });
}

void cross_entropy_backward(const CrossEntropyBackward& a) {
  visit(a, a.dentropy, [&](auto tag, auto scores, auto entropy) { backward<decltype(tag), scores, entropy>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
