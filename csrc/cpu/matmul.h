// Products of small matrices, for kernels that work tile by tile: C [rows, cols] (+)= A [rows, depth] · B.
//
// A is row-major. B is packed in panels of kPanel columns, in each of them row by row, kStep rows interleaved: what
// a multiply-add instruction takes at once (two bfloat16 of the depth, or one float32). C is float32, row-major.
// cols must be whole panels; rows and depth multiples of kRowUnit and kDepthUnit<E>.
#pragma once

#include "fetch.h"
#include "simd.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace fastllm::cpu::FASTLLM_ISA {

constexpr int kPanel = 2 * kLanes;

// What tiles of inputs of type T are made of: bfloat16 where the processor multiplies it, else float32.
#if defined(__AVX512BF16__)
template <typename T> struct TileOf { using Type = float; };
template <> struct TileOf<bfloat16> { using Type = bfloat16; };
#else
template <typename T> struct TileOf { using Type = float; };
#endif

template <typename E> constexpr int kStep = 4 / sizeof(E);

#if defined(__AMX_BF16__)
constexpr int kRowUnit = 2 * kTileRows;
template <typename E> constexpr int kDepthUnit = sizeof(E) == 2 ? kTileDepth : 1;
#else
struct Tiles {  // a thread that multiplies holds one
  Tiles() {}
};
constexpr int kRowUnit = 1;
template <typename E> constexpr int kDepthUnit = kStep<E>;
#endif

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// kBlockRows × two vectors of sums leave registers for two vectors of B and one of A.
#if defined(__AVX512F__)
constexpr int kBlockRows = 12;
#elif defined(__AVX2__)
constexpr int kBlockRows = 6;
#else
constexpr int kBlockRows = 4;
#endif

inline vfloat multiply_add(vfloat c, const float* a, const float* b) { return c + *a * load(b); }
#if defined(__AVX512BF16__)
inline vfloat multiply_add(vfloat c, const bfloat16* a, const bfloat16* b) {
  const vuint32 pair = load_bits<uint32_t>(a) - vuint32{};
  return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)pair, (__m512bh)load_bits<vuint32>(b));
}
#endif

// Products summed one after another before they are added to C: in float32 a longer chain loses digits. bfloat16
// has none to lose.
template <typename E> constexpr int64_t kChain = sizeof(E) == 2 ? int64_t(1) << 30 : 64;

// One panel, whose rows are kStride apart. Meanwhile what `ahead` names comes into the L2 cache.
template <int kRows, int kStride = kPanel, typename E, typename Fetch = NoFetch>
inline __attribute__((always_inline)) void matmul_block(const E* a, int64_t lda, const E* b, int64_t depth, float* c,
                                                        int64_t ldc, bool accumulate, Fetch ahead = {}) {
  const E* rows[(kRows + 2) / 3];  // a pointer for three rows: x86 addresses them as p, p + lda, p + 2 lda
#pragma GCC unroll 4
  for (int g = 0; g < (kRows + 2) / 3; ++g) rows[g] = a + 3 * g * lda;
  if (accumulate && sizeof(E) == 4)  // C may lie in the L3 cache; bfloat16 is done before it could come
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) __builtin_prefetch(c + r * ldc + v * kLanes, 1);
  for (int64_t from = 0; from < depth; from += kChain<E>) {
    vfloat sums[kRows][2] = {};
    for (int64_t k = from; k < depth && k < from + kChain<E>; k += kStep<E>) {
      ahead.step();
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v)
          sums[r][v] = multiply_add(sums[r][v], rows[r / 3] + r % 3 * lda, b + v * kStep<E> * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < (kRows + 2) / 3; ++g) rows[g] += kStep<E>;
      b += kStep<E> * kStride;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) {
        float* p = c + r * ldc + v * kLanes;
        store(p, accumulate || from ? load(p) + sums[r][v] : sums[r][v]);
      }
  }
}

// The last rows, fewer than kBlockRows.
template <int kRows = kBlockRows - 1, typename E>
inline void matmul_rest(int64_t rows, const E* a, int64_t lda, const E* b, int64_t depth, float* c, int64_t ldc,
                        bool accumulate) {
  if (rows == kRows) return matmul_block<kRows>(a, lda, b, depth, c, ldc, accumulate);
  if constexpr (kRows > 1) matmul_rest<kRows - 1>(rows, a, lda, b, depth, c, ldc, accumulate);
}

template <typename E>
inline __attribute__((noinline)) void matmul(int64_t rows, int64_t cols, int64_t depth, const E* a, int64_t lda,
                                             const E* b, float* c, int64_t ldc, bool accumulate) {
  for (int64_t j = 0; j < cols; j += kPanel, b += depth * kPanel) {
#if defined(__AMX_BF16__)
    if constexpr (sizeof(E) == 2) {
      for (int64_t i = 0; i < rows; i += kRowUnit)
        amx_block(a + i * lda, lda, b, depth, c + i * ldc + j, ldc, accumulate);
      continue;
    }
#endif
    int64_t i = 0;
    for (; i + kBlockRows <= rows; i += kBlockRows)
      matmul_block<kBlockRows>(a + i * lda, lda, b, depth, c + i * ldc + j, ldc, accumulate);
    if (i < rows) matmul_rest(rows - i, a + i * lda, lda, b, depth, c + i * ldc + j, ldc, accumulate);
  }
}

}  // namespace fastllm::cpu::FASTLLM_ISA
