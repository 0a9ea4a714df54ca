// What the attention kernels share: which rows a block has, which of them see which columns, and scores.
//
// A block has rows of one head: queries, whose columns are the keys, or (dk and dv) keys, whose columns are the
// queries. Scores are in base 2. Columns come in blocks, of which only those at the edges of what is seen compare
// positions.
#pragma once

#include <algorithm>

#include "../attention.h"

#include "launch.h"
#include "tile.h"

namespace fastllm::cuda::attention {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr int kFar = 1 << 30;  // kUnbounded in 32 bits: sums of two fit
constexpr int64_t kL2Bytes = 1 << 24;  // of keys and values that blocks running at once share

// The element type and the padded dim of this compilation, of those below; a compiler that is told nothing makes all.
#ifdef FASTLLM_DIM
#define FASTLLM_EACH_ATTENTION(f) f(FASTLLM_ELEMENT, FASTLLM_DIM)
#else
#define FASTLLM_EACH_ATTENTION(f)                                                                    \
  f(__half, 64) f(__half, 96) f(__half, 128) f(__half, 192) f(__half, 256) f(__nv_bfloat16, 64)      \
      f(__nv_bfloat16, 96) f(__nv_bfloat16, 128) f(__nv_bfloat16, 192) f(__nv_bfloat16, 256)
#endif

// ---- scores ----

// Of a product x the score in base 2 is x * factor, or with a softcap cap * tanh(x * factor).
struct Scores {
  float factor, cap;

  explicit Scores(const Attention& a)
      : factor(a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2e), cap(a.softcap * kLog2e) {}

  // Largest products have the largest scores, and one multiply-add scales and subtracts.
  __device__ bool fused() const { return cap == 0.0f && factor > 0.0f; }
};

// To float32's accuracy, by Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
__device__ inline float tanh(float x) {
  const float z = x * x;
  float p = fmaf(-5.70498872745e-3f, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float far = 1.0f - 2.0f * approximate_reciprocal(1.0f + approximate_exp2(2.0f * kLog2e * fabsf(x)));
  return z < 0.390625f ? fmaf(x * z, p, x) : copysignf(far, x);
}

template <int TILES, int N>
__device__ inline void to_scores(Product<TILES, N>& s, const Scores& scores) {
  if (scores.cap == 0.0f)
    each<TILES, N>(s, [&](float& x, int, int, int) { x *= scores.factor; });
  else
    each<TILES, N>(s, [&](float& x, int, int, int) { x = scores.cap * tanh(x * scores.factor); });
}

// Online softmax of the rows of a warp: the largest score and the sum of 2^(score - largest), each lane's part of it.
template <int TILES>
struct Softmax {
  float top[TILES][2], sum[TILES][2];

  __device__ Softmax() {
#pragma unroll
    for (int t = 0; t < TILES; ++t) top[t][0] = top[t][1] = -INFINITY, sum[t][0] = sum[t][1] = 0.0f;
  }

  // Makes probabilities of scores, which count `factor` times, and scales o to the new largest ones.
  template <int N, int M>
  __device__ void add(Product<TILES, N>& s, float factor, Product<TILES, M>& o) {
    float alpha[TILES][2];
    bool moved = false;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = top[t][half];
#pragma unroll
        for (int n = 0; n < N; ++n) most = fmaxf(most, fmaxf(s[t][n][half * 2], s[t][n][half * 2 + 1]));
        most = quad_reduce(Max(), most);
        // Both products rounded, never one in a multiply-add: where the largest score stays, alpha must be 1.
        const float base = most == -INFINITY ? 0.0f : __fmul_rn(most, factor);  // a row that has seen nothing
        alpha[t][half] = approximate_exp2(__fmul_rn(top[t][half], factor) - base);
        moved |= alpha[t][half] != 1.0f;
        top[t][half] = most;
        float part = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = s[t][n][half * 2 + c];
            x = approximate_exp2(fmaf(x, factor, -base));
            part += x;
          }
        sum[t][half] = fmaf(sum[t][half], alpha[t][half], part);
      }
    if (!__any_sync(0xffffffffu, moved)) return;  // most blocks raise no row's largest score
    each<TILES, M>(o, [&](float& x, int t, int half, int) { x *= alpha[t][half]; });
  }
};

// ---- what sees what ----

// Row r sees the columns r + shift - left to r + shift + right, those that are there.
struct Band {
  int shift, left, right, cols;

  __device__ int first(int row) const { return max(0, row + shift - left); }
  __device__ int end(int row) const { return min(cols, row + shift + right + 1); }

  // Of columns as rows.
  __device__ Band transposed(int rows) const { return {-shift, right, left, rows}; }

  // Whether the rows low to high see all of the columns; whether one of them sees one.
  __device__ bool whole(int low, int high, int col, int n) const {
    return col >= high + shift - left && col + n <= end(low);
  }
  __device__ bool any(int low, int high, int col, int n) const {
    return col + n > low + shift - left && col < end(high);
  }
};

// Puts `hidden` in place of what rows do not see of the columns from `col` on; row_of(tile, half) is a lane's row.
template <int TILES, int N, typename RowOf>
__device__ inline void mask(Product<TILES, N>& s, const Band& band, int col, float hidden, RowOf row_of) {
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row_of(t, half);
      const int first = r + band.shift - band.left - col - lane_col(), end = band.end(r) - col - lane_col();
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (n * 8 + c < first || n * 8 + c >= end) s[t][n][half * 2 + c] = hidden;
    }
}

// ---- which rows a block has ----

// Blocks of all rows of an item, a head of a sequence (packed documents: of all), for `group` items at a time, so that
// blocks which run at once share keys in L2.
struct Schedule {
  int blocks, items, group, rows;  // rows of a block
  int heads_per_kv;
  bool of_keys;

  Schedule(const Attention& a, bool of_keys, int rows) : rows(rows), heads_per_kv(int(a.group())), of_keys(of_keys) {
    const int64_t tokens = of_keys ? a.len_k : a.len_q, others = of_keys ? a.len_q : a.len_k;
    const int64_t heads = of_keys ? a.kv_heads : a.heads;
    // Packed, document s begins at block cu[s] / rows + s, where no other document's blocks are.
    blocks = int(a.cu_q ? tokens / rows + a.sequences : ceil_div(tokens, rows));
    items = int((a.cu_q ? 1 : a.sequences) * heads);
    const int64_t bytes = std::max<int64_t>(1, others * (a.dim + a.dim_v) * 2 * (of_keys ? heads_per_kv : 1));
    group = int(std::min<int64_t>(items, std::max<int64_t>(1, kL2Bytes / bytes) * (of_keys ? 1 : heads_per_kv)));
  }

  bool empty() const { return blocks == 0 || items == 0; }
  dim3 grid() const { return dim3(unsigned(blocks) * unsigned(items)); }
};

// A block's rows, and the sequence that they are of.
struct Work {
  int head;  // of the queries, or of the keys
  int row, rows;  // first one, and how many the sequence has; none: row >= rows
  int len_q, len_k;
  int sequence, first_q, first_k;  // tokens before the sequence: rows of out, of dk and dv

  __device__ Work(const Attention& a, const Schedule& schedule, const int64_t* seen = nullptr) {
    const int index = blockIdx.x, group = schedule.group, blocks = schedule.blocks;
    const int start = index / (group * blocks) * group, width = min(group, schedule.items - start);
    const int within = index - start * blocks, item = start + within % width;
    int block = within / width;
    if (a.cu_q) {
      head = item;
      const int64_t* cu = schedule.of_keys ? a.cu_k : a.cu_q;
      int low = 0, high = int(a.sequences);  // the last sequence that begins at `block` or before
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (int(cu[middle]) / schedule.rows + middle <= block ? low : high) = middle;
      }
      sequence = low;
      block -= int(cu[low]) / schedule.rows + low;
      first_q = int(a.cu_q[low]), first_k = int(a.cu_k[low]);
      len_q = int(a.cu_q[low + 1]) - first_q, len_k = int(a.cu_k[low + 1]) - first_k;
    } else {
      const int heads = int(schedule.of_keys ? a.kv_heads : a.heads);
      head = item % heads, sequence = item / heads;
      len_q = int(a.len_q), len_k = int(a.len_k);
      if (seen) len_k = int(max(int64_t(0), min(seen[sequence], a.len_k)));
      first_q = sequence * len_q, first_k = sequence * int(a.len_k);
    }
    rows = schedule.of_keys ? len_k : len_q;
    const int last = (rows + schedule.rows - 1) / schedule.rows - 1;
    // Causal, the last queries see the most keys: longest first. The first keys are seen by the most queries.
    row = (schedule.of_keys || block > last ? block : last - block) * schedule.rows;
  }

  __device__ bool none() const { return row >= rows; }

  __device__ Band band(const Attention& a) const {
    return {len_k - len_q, int(min(a.left, int64_t(kFar))), int(min(a.right, int64_t(kFar))), len_k};
  }

  // The rows of a head: packed documents have no batch.
  template <typename T>
  __device__ Source<T> source(const Attention& a, const Heads& x, bool of_keys, int head, int64_t dim) const {
    const int64_t first = a.cu_q ? (of_keys ? first_k : first_q) * x.token : sequence * x.batch;
    return {static_cast<const T*>(x.data) + first + head * x.head, x.token, int(dim)};
  }

  // Where lse and delta have the sequence's queries of a head of q.
  __device__ int64_t statistics(const Attention& a, int head) const {
    return a.cu_q ? head * a.len_q + first_q : (sequence * a.heads + head) * a.len_q;
  }
};

}  // namespace fastllm::cuda::attention
