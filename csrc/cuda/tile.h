// Tiles of 16-bit elements in shared memory and what tensor cores multiply of them: mma.sync m16n8k16, whose operands
// and results are spread over the lanes of a warp as ptx.h says.
#pragma once

#include "ptx.h"
#include "reduce.h"
#include "vec.h"

namespace fastllm::cuda {

constexpr int kUnit = 8;  // elements of 16 bytes, which copies and ldmatrix move at once

// Rows of D elements. Unit u of row r is kept at u ^ (r & 7), so that the 8 rows that ldmatrix reads of one column lie
// in different banks. Rows of an odd multiple of 64 bytes begin in two places of a bank line by turns: there two bits
// of r / 2 do.
template <typename T, int D>
struct Tile {
  static_assert(D % 32 == 0, "units that are exchanged must be whole groups of 4 or 8");
  static constexpr int kUnits = D / kUnit;

  T* data;

  __device__ T* at(int row, int unit) const {
    const int swizzled = kUnits % 8 == 0 ? unit ^ (row & 7) : unit ^ (row >> 1 & 3);
    return data + (row * kUnits + swizzled) * kUnit;
  }
  __device__ T* end(int rows) const { return data + rows * D; }
};

// Rows in global memory: aligned to 16 bytes, `cols` of them a multiple of 8.
template <typename T>
struct Source {
  const T* data;
  int64_t stride;
  int cols;
};

// Begins to copy the rows from `first` on, by all threads of the block; those from `end` on and columns beyond the
// source's are 0. A thread copies one unit of every kAtOnce-th row: an address and a step take fewer registers than the
// addresses that the compiler would keep.
template <int ROWS, int THREADS, typename T, int D>
__device__ inline void load_tile(const Tile<T, D>& tile, const Source<T>& from, int first, int end,
                                 int thread = threadIdx.x) {
  forget(thread);
  constexpr int kUnits = Tile<T, D>::kUnits, kAtOnce = THREADS / kUnits;
  static_assert(kAtOnce > 0, "a row needs a thread for each unit");
  int row = thread / kUnits;
  const int unit = thread % kUnits;
  if (THREADS % kUnits != 0 && row >= kAtOnce) return;
  const bool inside = unit * kUnit < from.cols;
  const T* source = from.data + int64_t(first + row) * from.stride + unit * kUnit;
#pragma unroll
  for (int i = 0; i < (ROWS + kAtOnce - 1) / kAtOnce; ++i) {
    if (ROWS % kAtOnce == 0 || row < ROWS) copy_async(tile.at(row, unit), source, inside && first + row < end);
    row += kAtOnce;
    source += kAtOnce * from.stride;
  }
}

// ---- fragments: what a lane holds of a [16, 16] operand ----

// Result of a product, [16 TILES, 8 N] in float32.
template <int TILES, int N>
using Product = float[TILES][N][4];
// The same as a first operand, in the element type.
template <int TILES, int N>
using Operand = uint32_t[TILES][N / 2][4];

__device__ inline int lane_id() { return threadIdx.x % kWarp; }
// The same for addresses in tiles: the compiler would keep all of a loop's in registers, and spill.
__device__ inline int lane_for_addresses() {
  int lane = lane_id();
  forget(lane);
  return lane;
}
// A lane's rows of a result, those of element 0 and 2: lane_row() and lane_row() + 8; its columns: lane_col() and next.
__device__ inline int lane_row() { return lane_id() / 4; }
__device__ inline int lane_col() { return lane_id() % 4 * 2; }

// s += a bᵀ, of the 16 TILES rows of a from `row` on and 8 N rows of b.
template <int TILES, int N, typename T, int D>
__device__ inline void add_product_transposed(Product<TILES, N>& s, const Tile<T, D>& a, int row, const Tile<T, D>& b) {
  const int lane = lane_for_addresses();
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t) load_matrices(left[t], a.at(row + t * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, b.at(n * 8 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        multiply(T(), s[t][n], left[t], right[0], right[1]);
        multiply(T(), s[t][n + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// o += p b, of 8 N rows of b.
template <int TILES, int N, typename T, int D>
__device__ inline void add_product(Product<TILES, D / 8>& o, const Operand<TILES, N>& p, const Tile<T, D>& b) {
  const int lane = lane_for_addresses();
#pragma unroll
  for (int k = 0; k < N / 2; ++k)
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, b.at(k * 16 + lane % 16, n + lane / 16));
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        multiply(T(), o[t][n], p[t][k], right[0], right[1]);
        multiply(T(), o[t][n + 1], p[t][k], right[2], right[3]);
      }
    }
}

// A result as the next product's first operand: the lanes hold the same elements of both.
template <typename T, int TILES, int N>
__device__ inline void round_to(Operand<TILES, N>& p, const Product<TILES, N>& s) {
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        p[t][n / 2][n % 2 * 2 + half] = pack_pair(T(), s[t][n][half * 2], s[t][n][half * 2 + 1]);
}

template <int TILES, int N>
__device__ inline void clear(Product<TILES, N>& s) {
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[t][n][e] = 0.0f;
}

// Calls f(element, tile, half of its rows, column) of each.
template <int TILES, int N, typename F>
__device__ inline void each(Product<TILES, N>& s, F f) {
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(s[t][n][e], t, e / 2, n * 8 + e % 2);
}

// Over the four lanes that share a row.
template <typename Op>
__device__ inline float quad_reduce(Op op, float value) {
  value = op(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return op(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Stores a warp's result, by way of rows of a tile that the warp alone still uses: row i of it at to + i * stride, where
// i < rows; `cols` of D columns.
template <int TILES, typename T, int D>
__device__ inline void store_rows(const Product<TILES, D / 8>& o, const Tile<T, D>& tile, int row, T* to,
                                  int64_t stride, int rows, int cols) {
  __syncwarp();  // the other lanes have read their part of the tile
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(tile.at(row + t * 16 + half * 8 + lane_row(), n) + lane_col()) =
            pack_pair(T(), o[t][n][half * 2], o[t][n][half * 2 + 1]);
  __syncwarp();
  constexpr int kUnits = Tile<T, D>::kUnits;
  for (int i = lane_id(); i < 16 * TILES * kUnits; i += kWarp) {
    const int r = i / kUnits, col = i % kUnits * kUnit;
    if (r >= rows || col >= cols) continue;
    const T* from = tile.at(row + r, i % kUnits);
    T* target = to + r * stride + col;
    if (cols % kUnit == 0)
      store<kUnit>(target, load<kUnit>(from));
    else
      for (int j = 0; j < kUnit && col + j < cols; ++j) target[j] = from[j];
  }
}

}  // namespace fastllm::cuda
