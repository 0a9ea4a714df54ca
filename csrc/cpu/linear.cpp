// The linear layer of inference, on CPUs. Few rows are bound by reading the weight: each thread streams a part of it.
//
// A row of the result is computed from that row of x alone, in an order of summation that depends on nothing else: any
// number of rows goes through the same blocks, in which rows do not meet.
#include "../linear.h"

#include "kernels.h"
#include "matmul.h"
#include "workspace.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kFeatures = Linear::kFeatures;
static_assert(kFeatures % kPanel == 0, "a panel of the weight is one or more of the matrix product");

constexpr int64_t kInCache = 1 << 20;   // bytes of panels that stay in the L2 cache while all rows go past them
constexpr int64_t kNear = 8192;         // bytes that a panel is fetched ahead of the only block of rows that needs it
constexpr int64_t kFewBytes = 1 << 16;  // of a weight that one thread has read before another wakes up

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename A, typename B> constexpr bool kSame = false;
template <typename A> constexpr bool kSame<A, A> = true;

#if defined(__AMX_BF16__)
template <typename E> constexpr bool kAmx = sizeof(E) == 2;
#else
template <typename E> constexpr bool kAmx = false;
#endif
template <typename E> constexpr int kBlock = kAmx<E> ? 32 : kBlockRows;  // rows
template <typename E> constexpr int kDepth = kAmx<E> ? 32 : kStep<E>;    // divides the depth

struct NoTiles {
  explicit NoTiles(int) {}
};
#if defined(__AMX_BF16__)
template <typename E> struct TilesOf { using Type = NoTiles; };
template <> struct TilesOf<bfloat16> { using Type = Tiles; };
#else
template <typename E> struct TilesOf { using Type = NoTiles; };
#endif

// Memory that is read soon: with each product another part of it, a panel in so many, comes into the cache.
struct Ahead {
  const char* start;
  int64_t panel_bytes, part, parts_of_panel;

  Fetch fetch(int64_t steps) const {
    const int64_t in_all = steps * parts_of_panel, bytes = in_all ? (panel_bytes + in_all - 1) / in_all : 0;
    return {start + part * panel_bytes / parts_of_panel, bytes};
  }
};

template <int kRows, typename E>
inline void multiply_rows(int64_t rows, const E* a, int64_t lda, const E* b, int64_t depth, float* c, Fetch ahead) {
  if (rows == kRows) {
    for (int j = 0; j < kFeatures; j += kPanel, ahead.at += ahead.bytes * (depth / kStep<E>))
      matmul_block<kRows, kFeatures>(a, lda, b + j * kStep<E>, depth, c + j, kFeatures, false, ahead);
  } else if constexpr (kRows > 1) {
    multiply_rows<kRows - 1>(rows, a, lda, b, depth, c, ahead);
  }
}

// c [rows, kFeatures] of a panel, for 1 to kBlock rows.
template <typename E>
inline __attribute__((noinline)) void multiply(int64_t rows, const E* a, int64_t lda, const E* b, int64_t depth,
                                               float* c, const Ahead& ahead) {
  const Fetch fetch = ahead.fetch(depth / kDepth<E> * (kAmx<E> ? 1 : kFeatures / kPanel));
#if defined(__AMX_BF16__)
  if constexpr (kAmx<E>) return amx_block(a, lda, b, depth, c, kFeatures, false, static_cast<int>(rows), fetch);
#endif
  multiply_rows<kBlock<E>>(rows, a, lda, b, depth, c, fetch);
}

// Two steps of the depth, whose numbers bfloat16 holds, interleaved.
inline vuint32 pairs(vfloat first, vfloat second) { return (vuint32)first >> 16 | (vuint32)second; }

// `count` steps of the depth, of one panel after another, as the product wants them; even where W or E is bfloat16.
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

template <typename N>
inline vfloat some(const N* p, int64_t count) {
  return count >= kLanes ? load(p) : load_partial(p, count & (kLanes - 1));
}

// The sums c [rows, kFeatures] of a panel become results, from `row` on; of a gated one silu of the gate's sums, times
// the others.
template <typename T, typename Out, bool kGated>
inline void finish(const Linear& a, int64_t panel, int64_t row, int64_t rows, const float* c) {
  constexpr int kCols = kGated ? kFeatures / 2 : kFeatures, kVectors = kCols / kLanes, kBehind = kFeatures - kCols;
  static_assert(kCols % kLanes == 0);
  const int64_t first = panel * kCols, cols = least(kCols, a.out_features - first);
  vfloat gate_scales[kVectors], scales[kVectors], bias[kVectors];
  for (int v = 0; v < kVectors && v * kLanes < cols; ++v) {
    const int64_t at = first + v * kLanes, count = cols - v * kLanes;
    if (a.scales) scales[v] = some(a.scales + at + (kGated ? a.out_features : 0), count);
    if (a.scales && kGated) gate_scales[v] = some(a.scales + at, count);
    if (a.bias) bias[v] = some(static_cast<const T*>(a.bias) + at, count);
  }
  Out* out = static_cast<Out*>(a.out) + row * a.out_features + first;
  for (int64_t r = 0; r < rows; ++r, out += a.out_features, c += kFeatures)
    for (int v = 0; v < kVectors && v * kLanes < cols; ++v) {
      vfloat x = load(c + kBehind + v * kLanes);
      if (a.scales) x = x * scales[v];
      if (a.bias) x = x + bias[v];
      if constexpr (kGated) {
        vfloat gate = load(c + v * kLanes);
        if (a.scales) gate = gate * gate_scales[v];
        x = gate * sigmoid(gate) * x;
      }
      const int64_t count = cols - v * kLanes;
      count >= kLanes ? store(out + v * kLanes, x) : store_partial(out + v * kLanes, x, count & (kLanes - 1));
    }
}

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

// Panels in E, where they are packed in another type.
template <typename E>
struct Expanded {
  E* data;
  Expanded(Arena& arena, int64_t count) : data(arena.array<E>(count)) {}
};

template <typename T, typename W>
void product(const Linear& a) {
  using E = typename TileOf<T>::Type;  // what the product is computed in
  constexpr bool kDirect = kSame<W, E>;
  constexpr int kRows = kBlock<E>;
  const int64_t panels = a.panels(), depth = round_up(a.in_features, kDepth<E>);
  const int64_t panel_size = a.packed_depth() * kFeatures, panel_bytes = panel_size * static_cast<int64_t>(sizeof(W));
  const bool copied = !kSame<T, E> || depth != a.in_features || a.x.inner != 1;
  const Buffer<E> copy(copied ? a.rows * depth : 0);
  const int64_t lda = copied ? depth : a.x.outer_stride;
  const E* const rows = copied ? static_cast<const E*>(copy) : static_cast<const E*>(a.x.data);
  const int64_t blocks_in_all = (a.rows + kRows - 1) / kRows;
  const int64_t fit = kInCache / (panel_size * static_cast<int64_t>(sizeof(E)) + 1);
  const int64_t together = most(1, least(fit, blocks_in_all));  // panels
  const PerThread<Expanded<E>> memory(kDirect ? 0 : together * panel_size);
  expect_large_write(a.out, a.rows * a.out_features * static_cast<int64_t>(a.wide ? sizeof(float) : sizeof(T)));

#pragma omp parallel if (panels * panel_bytes * a.rows > kFewBytes)
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
    const int64_t parts = parts_of_rows(blocks_in_all, panels, threads), over = threads / parts;
    const Range mine = part_of(a.rows, kRows, thread / over, parts);
    const Range features = part_of(panels, 1, thread % over, over);
    // AMX's tiles have one number of rows: the last block begins with rows of the one before it.
    const bool overlaps = kAmx<E> && mine.end - mine.begin >= kRows;
    const int64_t last = overlaps ? mine.end - kRows : mine.end;
    const int64_t blocks = (mine.end - mine.begin + kRows - 1) / kRows;
    const typename TilesOf<E>::Type tiles(static_cast<int>(overlaps ? kRows : mine.end - mine.begin));
    Arena arena = memory.mine();
    const Expanded<E> expanded(arena, kDirect ? 0 : together * panel_size);
    alignas(64) float sums[kRows * kFeatures] = {};

    for (int64_t first = features.begin; first < features.end; first += together) {
      const int64_t count = least(together, features.end - first);
      const W* const packed = static_cast<const W*>(a.weight) + first * panel_size;
      const E* b;
      if constexpr (kDirect) {
        b = packed;
      } else {
        expand(packed, count * panel_size / kFeatures, expanded.data);
        b = expanded.data;
      }
      const bool near = kDirect && blocks == 1;  // what is expanded has been read
      const char* const next = reinterpret_cast<const char*>(packed) + (near ? kNear : count * panel_bytes);
      Ahead ahead{next, panel_bytes, 0, blocks};
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t from = least(mine.begin + i * kRows, last), some_rows = least(kRows, mine.end - from);
        for (int64_t p = 0; p < count; ++p) {
          multiply(some_rows, rows + from * lda, lda, b + p * panel_size, depth, sums, ahead);
          const auto finish_as = [&](auto out) {
            using Out = decltype(out);
            a.gated ? finish<T, Out, true>(a, first + p, from, some_rows, sums)
                    : finish<T, Out, false>(a, first + p, from, some_rows, sums);
          };
          a.wide ? finish_as(float{}) : finish_as(T{});
          ++ahead.part;
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
