// The linear layer of inference, on CPUs. Few rows are bound by reading the weight, which each thread streams a part of.
//
// A row of the result is computed from that row of x alone, in an order of summation that depends on nothing else: every
// number of rows goes through the same blocks, in which rows do not meet.
#include "../linear.h"

#include "kernels.h"
#include "matmul.h"
#include "workspace.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kFeatures = Linear::kFeatures;
static_assert(kFeatures % kPanel == 0, "a panel of the weight is one or more of the matrix product");

constexpr int kAheadBytes = 8192;              // that a panel is fetched before it is needed
constexpr int64_t kRowsInCache = 1024 * 1024;  // bytes of the rows that stay in the L2 cache beside a panel
constexpr int64_t kFewBytes = 1 << 16;         // of a weight that one thread has read before another wakes up

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename A, typename B> constexpr bool kSame = false;
template <typename A> constexpr bool kSame<A, A> = true;

// What the product of x in T with a weight in W is computed in.
template <typename T, typename W> struct OperandOf { using Type = typename TileOf<T>::Type; };

#if defined(__AMX_BF16__)
template <typename E> constexpr bool kAmx = sizeof(E) == 2;
#else
template <typename E> constexpr bool kAmx = false;
#endif
template <typename E> constexpr int kBlock = kAmx<E> ? 32 : kBlockRows;         // rows
template <typename E> constexpr int kDepth = kAmx<E> ? 32 : kStep<E>;           // divides the depth
template <typename E> constexpr int kExpanded = 16384 / (kFeatures * sizeof(E));  // depth of what is expanded at once

struct NoTiles {
  explicit NoTiles(int) {}
};
#if defined(__AMX_BF16__)
template <typename E> struct TilesOf { using Type = NoTiles; };
template <> struct TilesOf<bfloat16> { using Type = Tiles; };
#else
template <typename E> struct TilesOf { using Type = NoTiles; };
#endif

template <int kAhead, int kRows, typename E>
inline void multiply_rows(int64_t rows, const E* a, int64_t lda, const E* b, int64_t depth, float* c, bool accumulate) {
  if (rows == kRows) {
    for (int j = 0; j < kFeatures; j += kPanel)
      matmul_block<kRows, kAhead, kFeatures>(a, lda, b + j * kStep<E>, depth, c + j, kFeatures, accumulate);
  } else if constexpr (kRows > 1) {
    multiply_rows<kAhead, kRows - 1>(rows, a, lda, b, depth, c, accumulate);
  }
}

// c [rows, kFeatures] of a panel, for 1 to kBlock rows.
template <int kAhead, typename E>
inline __attribute__((noinline)) void multiply(int64_t rows, const E* a, int64_t lda, const E* b, int64_t depth,
                                               float* c, bool accumulate) {
#if defined(__AMX_BF16__)
  if constexpr (kAmx<E>) return amx_block<kAhead>(a, lda, b, depth, c, kFeatures, accumulate, static_cast<int>(rows));
#endif
  multiply_rows<kAhead, kBlock<E>>(rows, a, lda, b, depth, c, accumulate);
}

// Two steps of the depth, whose numbers bfloat16 holds, interleaved.
inline vuint32 pairs(vfloat first, vfloat second) { return (vuint32)first >> 16 | (vuint32)second; }

// Steps of a panel, from the first that w points to, as the product wants them. count is even where W or E is bfloat16.
template <typename W, typename E>
inline void expand(const W* w, int64_t count, E* out) {
  if constexpr (kSame<W, bfloat16>) {
    for (int64_t k = 0; k < count; k += 2, w += 2 * kFeatures, out += 2 * kFeatures)
      for (int j = 0; j < kFeatures; j += kLanes) {
        const vuint32 both = load_bits<vuint32>(w + 2 * j);
        store(out + j, (vfloat)(both << 16));
        store(out + kFeatures + j, (vfloat)(both & 0xffff0000u));
      }
  } else if constexpr (kSame<E, bfloat16>) {
    for (int64_t k = 0; k < count; k += 2, w += 2 * kFeatures, out += 2 * kFeatures)
      for (int j = 0; j < kFeatures; j += kLanes) store_bits(out + 2 * j, pairs(load(w + j), load(w + kFeatures + j)));
  } else {
    for (int64_t i = 0; i < count * kFeatures; i += kLanes) store(out + i, load(w + i));
  }
}

// The rows of x in E, filled up with zeros to a depth of lda.
template <typename T, typename E>
void copy_row(const T* x, int64_t cols, E* out, int64_t lda) {
  if constexpr (kSame<T, E>) {
    std::memcpy(out, x, cols * sizeof(T));
  } else {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) store(out + j, load(x + j));
    if (j < cols) store_partial(out + j, load_partial(x + j, cols - j), cols - j);
  }
  std::memset(out + cols, 0, (lda - cols) * sizeof(E));
}

// What is done with the sums of a panel.
template <typename T>
class Epilogue {
 public:
  Epilogue(const Linear& a, int64_t panel)
      : out_(static_cast<T*>(a.out) + panel * kFeatures),
        stride_(a.out_features),
        cols_(least(kFeatures, a.out_features - panel * kFeatures)),
        scaled_(a.scales),
        biased_(a.bias) {
    const int64_t first = panel * kFeatures;
    for (int64_t j = 0; j < cols_; j += kLanes) {
      if (scaled_) store(scales_ + j, some(a.scales + first + j, cols_ - j));
      if (biased_) store(bias_ + j, some(static_cast<const T*>(a.bias) + first + j, cols_ - j));
    }
  }

  void finish(int64_t row, int64_t rows, const float* c) const {
    T* out = out_ + row * stride_;
    for (int64_t r = 0; r < rows; ++r, out += stride_, c += kFeatures)
      for (int64_t j = 0; j < cols_; j += kLanes) {
        vfloat v = load(c + j);
        if (scaled_) v = v * load(scales_ + j);
        if (biased_) v = v + load(bias_ + j);
        cols_ - j >= kLanes ? store(out + j, v) : store_partial(out + j, v, cols_ - j);
      }
  }

 private:
  template <typename N>
  static vfloat some(const N* p, int64_t count) {
    return count >= kLanes ? load(p) : load_partial(p, count);
  }

  T* const out_;
  const int64_t stride_, cols_;
  const bool scaled_, biased_;
  float scales_[kFeatures], bias_[kFeatures];
};

struct Range {
  int64_t begin, end;
};
// Part i of so many, in whole units but for the last.
inline Range part_of(int64_t count, int64_t unit, int64_t i, int64_t parts) {
  const int64_t units = (count + unit - 1) / unit;
  return {least(units * i / parts * unit, count), least(units * (i + 1) / parts * unit, count)};
}

// Over how many threads to share out the rows, so that the longest part is the shortest; the rest is for the panels.
inline int64_t parts_of_rows(int64_t blocks, int64_t panels, int64_t threads) {
  int64_t best = 1, least_work = -1;
  for (int64_t parts = 1; parts <= least(blocks, threads); ++parts) {
    if (threads % parts) continue;
    const int64_t over = threads / parts, work = ((blocks + parts - 1) / parts) * ((panels + over - 1) / over);
    if (least_work < 0 || work < least_work) best = parts, least_work = work;
  }
  return best;
}

// The sums of a chunk of rows in the blocks of a panel: kept where the depth comes in parts.
struct Sums {
  float* data;
  Sums(Arena& arena, int64_t rows, int block) : data(arena.array<float>(round_up(rows, block) * kFeatures)) {}
};

template <typename T, typename W>
void product(const Linear& a) {
  using E = typename OperandOf<T, W>::Type;
  constexpr bool kDirect = kSame<W, E>;
  constexpr int kRows = kBlock<E>, kAhead = kAheadBytes / sizeof(W);
  const int64_t panels = a.panels(), packed_depth = a.packed_depth(), depth = round_up(a.in_features, kDepth<E>);
  const int64_t bytes = panels * packed_depth * kFeatures * static_cast<int64_t>(sizeof(W));
  const bool copied = !kSame<T, E> || depth != a.in_features || a.x.inner != 1;
  const Buffer<E> copy(copied ? a.rows * depth : 0);
  const int64_t lda = copied ? depth : a.x.outer_stride;
  const E* const rows = copied ? static_cast<const E*>(copy) : static_cast<const E*>(a.x.data);
  const int64_t fit = kRowsInCache / (depth * static_cast<int64_t>(sizeof(E)) + 1);
  const int64_t chunk = least(a.rows, (fit < kRows ? 1 : fit > 512 ? 512 / kRows : fit / kRows) * kRows);
  const PerThread<Sums> memory(kDirect ? 0 : chunk, kRows);
  expect_large_write(a.out, a.rows * a.out_features * static_cast<int64_t>(sizeof(T)));

#pragma omp parallel if (bytes * a.rows > kFewBytes)
  {
    if (copied) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < a.rows; ++r)
        copy_row(row<T>(a.x, r), a.in_features, static_cast<E*>(copy) + r * depth, depth);
    }
#if defined(_OPENMP)
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
    const int64_t thread = 0, threads = 1;
#endif
    const int64_t parts = parts_of_rows((a.rows + kRows - 1) / kRows, panels, threads), over = threads / parts;
    const Range mine = part_of(a.rows, kRows, thread / over, parts);
    const Range features = part_of(panels, 1, thread % over, over);
    // The last block of AMX's tiles, of which each has its number of rows, begins with rows of the block before it.
    const bool overlaps = kAmx<E> && mine.end - mine.begin >= kRows;
    const int64_t last = overlaps ? mine.end - kRows : mine.end;
    const typename TilesOf<E>::Type tiles(static_cast<int>(overlaps ? kRows : mine.end - mine.begin));
    Arena arena = memory.mine();
    const Sums sums(arena, kDirect ? 0 : chunk, kRows);
    alignas(64) float block[kRows * kFeatures] = {};
    alignas(64) E expanded[kDirect ? 1 : kExpanded<E> * kFeatures];

    for (int64_t from = mine.begin; from < mine.end; from += chunk) {
      const int64_t to = least(from + chunk, mine.end);
      for (int64_t panel = features.begin; panel < features.end; ++panel) {
        const W* w = static_cast<const W*>(a.weight) + panel * packed_depth * kFeatures;
        const Epilogue<T> epilogue(a, panel);
        const auto each_block = [&](auto&& body) {
          for (int64_t i = from; i < to; i += kRows) body(least(i, last), least(kRows, mine.end - least(i, last)), i);
        };
        if constexpr (kDirect) {
          each_block([&](int64_t first, int64_t count, int64_t i) {
            const E* x = rows + first * lda;
            if (i == from) multiply<kAhead>(count, x, lda, w, depth, block, false);
            else multiply<0>(count, x, lda, w, depth, block, false);
            epilogue.finish(first, count, block);
          });
        } else {
          const bool few = to - from <= kRows;
          float* const c = few ? block : sums.data;
          if (!depth) std::memset(c, 0, round_up(to - from, kRows) * kFeatures * sizeof(float));
          for (int64_t k = 0; k < depth; k += kExpanded<E>) {
            const int64_t steps = least(kExpanded<E>, depth - k);
            expand(w + k * kFeatures, kSame<W, bfloat16> ? steps + steps % 2 : steps, expanded);
            each_block([&](int64_t first, int64_t count, int64_t i) {
              multiply<0>(count, rows + first * lda + k, lda, expanded, steps, c + (i - from) * kFeatures, k > 0);
            });
          }
          each_block([&](int64_t first, int64_t count, int64_t i) {
            epilogue.finish(first, count, c + (i - from) * kFeatures);
          });
        }
      }
    }
  }
}

}  // namespace

void linear(const Linear& a) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    a.scales ? product<T, int8_t>(a) : product<T, T>(a);
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
