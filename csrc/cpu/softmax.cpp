// Softmax on CPUs. Forward, a row's exponentials wait in the cache for their sum; a row too long for that is
// read twice, and its exponentials are computed twice. Backward reads dy and y twice, the second time from the
// cache. Memory moves one read and one write forward, two reads and one write backward.
#include "../softmax.h"

#include "kernels.h"
#include "online.h"
#include "workspace.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

struct NoMask {};

// A score under its mask. A boolean one selects: what it hides may be NaN.
template <typename At>
inline vfloat under(const NoMask*, At&&, vfloat s) {
  return s;
}
template <typename At>
inline vfloat under(const uint8_t* mask, At&& at, vfloat s) {
  return at(mask) != 0.f ? s : broadcast(-__builtin_inff());
}
template <typename M, typename At>
inline vfloat under(const M* mask, At&& at, vfloat s) {
  return s + at(mask);
}

template <typename M>
inline const M* mask_row(const Mask& mask, int64_t r) {
  const int64_t group = r / mask.inner;
  return static_cast<const M*>(mask.data) + group / mask.middle * mask.outer_stride +
         group % mask.middle * mask.middle_stride + r % mask.inner * mask.inner_stride;
}
template <>
inline const NoMask* mask_row<NoMask>(const Mask&, int64_t) {
  return nullptr;
}

constexpr int64_t kHeld = 16384;  // the longest row whose exponentials wait, 64 KiB

// Of a thread: the exponentials.
struct Scratch {
  float* held;
  Scratch(Arena& arena, int64_t cols) : held(arena.array<float>(cols < kHeld ? cols + kLanes : kHeld)) {}
};

// y = softmax of the scores, `count` <= kHeld.
template <typename T, typename Score>
void held_row(T* y, int64_t count, float* held, Score&& score) {
  for_each_vector(count, [&](auto at, auto put) { put(held, score(at)); });
  int64_t padded = count;
  while (padded % kLanes) held[padded++] = -__builtin_inff();
  vfloat chains[2] = {broadcast(-__builtin_inff()), broadcast(-__builtin_inff())};
  for (int64_t j = 0; j < padded; j += kLanes) chains[j / kLanes % 2] = maximum(load(held + j), chains[j / kLanes % 2]);
  const float most = greatest(maximum(chains[0], chains[1]));
  const float shift = most == -__builtin_inff() ? 0.f : most;  // nothing is seen
  const float sum = sum_over(padded, [&](auto at, auto put) {
    const vfloat e = exp(at(held) - shift);
    put(held, e);
    return e;
  });
  const float divisor = sum == 0.f ? 1.f : sum;
  for_each_vector(count, [&](auto at, auto put) { put(y, at(held) / divisor); });
}

// The same of any length.
template <typename T, typename Score>
void long_row(T* y, int64_t count, Score&& score) {
  const auto found = exp_sum(count, score);
  const float shift = found.shift(), sum = found.sum(), divisor = sum == 0.f ? 1.f : sum;
  for_each_vector(count, [&](auto at, auto put) { put(y, exp(score(at) - shift) / divisor); });
}

template <typename T, typename M>
void forward(const SoftmaxForward& a) {
  T* ys = static_cast<T*>(a.y);
  expect_large_write(ys, a.rows * a.cols * static_cast<int64_t>(sizeof(T)));
  const PerThread<Scratch> memory(a.cols);
#pragma omp parallel if (a.rows * a.cols > kParallelElements)
  {
    Arena arena = memory.mine();
    float* const held = Scratch(arena, a.cols).held;
#pragma omp for schedule(guided) nowait
    for (int64_t r = 0; r < a.rows; ++r) {
      const T* x = row<T>(a.x, r);
      const M* mask = mask_row<M>(a.mask, r);
      T* y = ys + r * a.cols;
      const int64_t seen = visible(r, a.cols, a.queries);
      const auto score = [&](auto at) { return settled(under(mask, at, at(x) * a.scale)); };
      seen <= kHeld ? held_row(y, seen, held, score) : long_row(y, seen, score);
      std::memset(static_cast<void*>(y + seen), 0, (a.cols - seen) * sizeof(T));
    }
  }
}

template <typename T>
void backward(const SoftmaxBackward& a) {
  T* dxs = static_cast<T*>(a.dx);
  expect_large_write(dxs, a.rows * a.cols * static_cast<int64_t>(sizeof(T)));
#pragma omp parallel for schedule(guided) if (a.rows * a.cols > kParallelElements)
  for (int64_t r = 0; r < a.rows; ++r) {
    const T *dy = row<T>(a.dy, r), *y = row<T>(a.y, r);
    T* dx = dxs + r * a.cols;
    const int64_t seen = visible(r, a.cols, a.queries);
    const float dot = sum_over(seen, [&](auto at, auto) { return at(y) * at(dy); });
    for_each_vector(seen, [&](auto at, auto put) { put(dx, at(y) * (at(dy) - dot) * a.scale); });
    std::memset(static_cast<void*>(dx + seen), 0, (a.cols - seen) * sizeof(T));
  }
}

}  // namespace

void softmax_forward(const SoftmaxForward& a) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    switch (a.mask.kind) {
      case MaskKind::none: return forward<T, NoMask>(a);
      case MaskKind::boolean: return forward<T, uint8_t>(a);
      case MaskKind::additive: return forward<T, T>(a);
      case MaskKind::additive_float32: return forward<T, float>(a);
    }
  });
}

void softmax_backward(const SoftmaxBackward& a) {
  with_type(a.dtype, [&](auto tag) { backward<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
