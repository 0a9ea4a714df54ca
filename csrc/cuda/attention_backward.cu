// Flash attention, backward (Dao 2023, arXiv:2307.08691), on tensor cores by mma.sync, in two passes that compute the
// scores anew and add in a fixed order: dk and dv of a block of keys over the queries that see them, dq of a block of
// queries over the keys that they see. With p = 2^(score - lse) and dp = dout vᵀ,
//   dv = pᵀ dout,   ds = p (dp - delta) (softcap: (1 - tanh²)),   dk = scale dsᵀ q,   dq = scale ds k.
// A warp has 16 TILES rows, and in its registers their p, ds and sums. Each tile of what a pass goes over has one place
// in shared memory: the next one is copied while the products that no longer need it run.

#include "attention_kernels.h"

namespace fastllm::cuda::attention {

// Of products x = q kᵀ their probabilities; `lse(tile, half, col)` is that of an element's query, in base 2.
// Queries that see nothing have an lse of -inf, and p = inf until the mask, which hides all of theirs.
template <int TILES, int N, typename Lse>
__device__ inline void to_probabilities(Product<TILES, N>& s, const Scores& scores, Lse lse) {
  if (scores.cap == 0.0f)
    each<TILES, N>(s, [&](float& x, int t, int half, int col) {
      x = approximate_exp2(fmaf(x, scores.factor, -lse(t, half, col)));
    });
  else
    each<TILES, N>(s, [&](float& x, int t, int half, int col) {
      x = approximate_exp2(fmaf(scores.cap, tanh(x * scores.factor), -lse(t, half, col)));
    });
}

// Hides p and ds of what rows do not see: ds too, for it may be NaN where a query that sees nothing has such a gradient.
template <int TILES, int N, typename RowOf>
__device__ inline void hide(Product<TILES, N>& s, Product<TILES, N>& ds, const Band& band, int col, RowOf row_of) {
  mask<TILES, N>(s, band, col, 0.0f, row_of);
  mask<TILES, N>(ds, band, col, 0.0f, row_of);
}

// Calls f(element of ds, the same of s).
template <int TILES, int N, typename F>
__device__ inline void each_pair(Product<TILES, N>& ds, const Product<TILES, N>& s, F f) {
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(ds[t][n][e], s[t][n][e]);
}

// The slope of the softcap at products x.
template <int TILES, int N>
__device__ inline void multiply_slopes(Product<TILES, N>& ds, const Product<TILES, N>& x, const Scores& scores) {
  if (scores.cap == 0.0f) return;
  each_pair<TILES, N>(ds, x, [&](float& d, float product) {
    const float t = tanh(product * scores.factor);
    d *= 1.0f - t * t;
  });
}

// ---- dk and dv ----

// Keys of a block are rows, its WARPS * 16 TILES or, where the sums of dk and dv don't fit a warp's registers (SPLIT),
// half as many: then half of the warps add up dv, the others, with the same keys, dk.
template <int WARPS, int TILES, int QUERIES, bool SPLIT, int BLOCKS>
struct KeysShape {
  static constexpr int kThreads = WARPS * kWarp, kTiles = TILES, kQueries = QUERIES, kBlocks = BLOCKS;
  static constexpr int kRows = WARPS * TILES * 16 / (SPLIT ? 2 : 1);
  static constexpr bool kSplit = SPLIT;
};

// Which queries come next: those of all heads that share the keys, one after another.
struct Queries {
  int head, row, begin, end;

  __device__ bool done(int last_head) const { return head >= last_head; }
  __device__ void advance(int rows) {
    row += rows;
    if (row < end) return;
    row = begin;
    ++head;
  }
};

template <typename T, int D, typename S, typename Memory>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    attention_dkdv_kernel(const AttentionBackward a, const Schedule schedule, const Scores scores) {
  constexpr int kTiles = S::kTiles, kQueries = S::kQueries, kN = kQueries / 8, kM = D / 8;
  const Work work(a, schedule);
  if (work.none()) return;
  const Tile<T, D> k{dynamic_shared<T>()}, v{k.end(S::kRows)}, q{v.end(S::kRows)}, dout{q.end(kQueries)};
  float* const lse = reinterpret_cast<float*>(dout.end(kQueries));  // of the queries
  float* const delta = lse + kQueries;
  const int warp = int(threadIdx.x) / kWarp;
  const bool wants_dk = !S::kSplit || warp * kTiles * 16 >= S::kRows, wants_dv = !S::kSplit || !wants_dk;
  const int in_tile = warp * kTiles * 16 % S::kRows, row = work.row + in_tile;
  const Band band = work.band(a).transposed(work.len_q);
  const int last = min(work.row + S::kRows, work.len_k) - 1, high = min(row + kTiles * 16 - 1, last);
  const int first_head = work.head * schedule.heads_per_kv, end_head = first_head + schedule.heads_per_kv;
  const int begin = band.first(work.row) / kQueries * kQueries;
  const auto row_of = [=](int t, int half) { return row + t * 16 + half * 8 + lane_row(); };

  load_tile<S::kRows, S::kThreads>(k, work.source<T>(a, a.k, true, work.head, a.dim), work.row, work.len_k);
  load_tile<S::kRows, S::kThreads>(v, work.source<T>(a, a.v, true, work.head, a.dim_v), work.row, work.len_k);

  Queries now{first_head, begin, begin, band.end(last)};
  if (now.row >= now.end) now.head = end_head;  // no query sees these keys
  const auto load_dout = [&](const Queries& at) {
    if (!at.done(end_head))
      load_tile<kQueries, S::kThreads>(dout, work.source<T>(a, a.dout, false, at.head, a.dim_v), at.row, work.len_q);
    commit_copies();
  };
  const auto load_q = [&](const Queries& at) {
    if (!at.done(end_head)) {
      load_tile<kQueries, S::kThreads>(q, work.source<T>(a, a.q, false, at.head, a.dim), at.row, work.len_q);
      const int query = at.row + int(threadIdx.x);
      const int64_t from = work.statistics(a, at.head) + query;
      if (threadIdx.x < kQueries) {
        copy_async(lse + threadIdx.x, a.lse + from, query < work.len_q);
        copy_async(delta + threadIdx.x, a.delta + from, query < work.len_q);
      }
    }
    commit_copies();
  };

  load_dout(now);
  load_q(now);
  // Split, a warp has one of the two, in dk.
  float dk[kTiles][kM][4], own_dv[S::kSplit ? 1 : kTiles][S::kSplit ? 1 : kM][4];
  Product<kTiles, kM>& dv = reinterpret_cast<Product<kTiles, kM>&>(*(S::kSplit ? **dk : **own_dv));
  clear<kTiles, kM>(dk);
  clear<kTiles, kM>(dv);

  while (!now.done(end_head)) {
    const bool any = band.any(row, high, now.row, kQueries);
    float s[kTiles][kN][4], ds[kTiles][kN][4];
    uint32_t rounded[kTiles][kN / 2][4];
    wait_copies<1>();  // dout is there
    __syncthreads();
    if (any && wants_dk) {
      clear<kTiles, kN>(ds);
      add_product_transposed<kTiles, kN>(ds, v, in_tile, dout);
    }
    wait_copies<0>();  // q is there
    __syncthreads();
    if (any) {
      clear<kTiles, kN>(s);
      add_product_transposed<kTiles, kN>(s, k, in_tile, q);
      if (wants_dk) {
        each<kTiles, kN>(ds, [&](float& x, int, int, int col) { x -= delta[col + lane_col()]; });
        multiply_slopes<kTiles, kN>(ds, s, scores);
      }
      to_probabilities<kTiles, kN>(s, scores, [&](int, int, int col) { return lse[col + lane_col()] * kLog2e; });
      if (!band.whole(row, high, now.row, kQueries)) hide<kTiles, kN>(s, ds, band, now.row, row_of);
      if (wants_dv) {
        round_to<T, kTiles, kN>(rounded, s);
        add_product<kTiles, kN>(dv, rounded, dout);
      }
    }
    __syncthreads();
    now.advance(kQueries);
    load_dout(now);
    if (any && wants_dk) {
      each_pair<kTiles, kN>(ds, s, [](float& d, float p) { d *= p; });
      round_to<T, kTiles, kN>(rounded, ds);
      add_product<kTiles, kN>(dk, rounded, q);
    }
    __syncthreads();
    load_q(now);
  }
  wait_copies<0>();
  __syncthreads();

  const int64_t kv_heads = a.kv_heads;
  if (wants_dv) {
    T* to = static_cast<T*>(a.dv) + (int64_t(work.first_k + row) * kv_heads + work.head) * a.dim_v;
    store_rows<kTiles>(dv, v, in_tile, to, kv_heads * a.dim_v, work.len_k - row, int(a.dim_v));
  }
  if (wants_dk) {
    each<kTiles, kM>(dk, [&](float& x, int, int, int) { x *= a.scale; });
    T* to = static_cast<T*>(a.dk) + (int64_t(work.first_k + row) * kv_heads + work.head) * a.dim;
    store_rows<kTiles>(dk, k, in_tile, to, kv_heads * a.dim, work.len_k - row, int(a.dim));
  }
}

// ---- dq ----

template <int WARPS, int TILES, int KEYS, int BLOCKS>
struct QueriesShape {
  static constexpr int kThreads = WARPS * kWarp, kTiles = TILES, kKeys = KEYS, kBlocks = BLOCKS;
  static constexpr int kRows = WARPS * TILES * 16;
};

template <typename T, int D, typename S, typename Memory>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    attention_dq_kernel(const AttentionBackward a, const Schedule schedule, const Scores scores) {
  constexpr int kTiles = S::kTiles, kKeys = S::kKeys, kN = kKeys / 8, kM = D / 8;
  const Work work(a, schedule);
  if (work.none()) return;
  const Tile<T, D> q{dynamic_shared<T>()}, dout{q.end(S::kRows)}, k{dout.end(S::kRows)}, v{k.end(kKeys)};
  const int kv_head = work.head / schedule.heads_per_kv, warp = int(threadIdx.x) / kWarp;
  const auto from_k = work.source<T>(a, a.k, true, kv_head, a.dim);
  const auto from_v = work.source<T>(a, a.v, true, kv_head, a.dim_v);
  const Band band = work.band(a);
  const int last = min(work.row + S::kRows, work.len_q) - 1, end = band.end(last);
  const int in_tile = warp * kTiles * 16, row = work.row + in_tile, high = min(row + kTiles * 16 - 1, last);
  int col = band.first(work.row) / kKeys * kKeys;
  const auto row_of = [=](int t, int half) { return row + t * 16 + half * 8 + lane_row(); };

  const auto load_v = [&](int first) {
    if (first < end) load_tile<kKeys, S::kThreads>(v, from_v, first, work.len_k);
    commit_copies();
  };
  const auto load_k = [&](int first) {
    if (first < end) load_tile<kKeys, S::kThreads>(k, from_k, first, work.len_k);
    commit_copies();
  };
  load_tile<S::kRows, S::kThreads>(q, work.source<T>(a, a.q, false, work.head, a.dim), work.row, work.len_q);
  load_tile<S::kRows, S::kThreads>(dout, work.source<T>(a, a.dout, false, work.head, a.dim_v), work.row, work.len_q);
  load_v(col);
  load_k(col);
  float lse[kTiles][2], delta[kTiles][2], dq[kTiles][kM][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row_of(t, half);
      const bool there = query < work.len_q;
      const int64_t from = there ? work.statistics(a, work.head) + query : 0;
      lse[t][half] = there ? a.lse[from] * kLog2e : 0.0f;
      delta[t][half] = there ? a.delta[from] : 0.0f;
    }
  clear<kTiles, kM>(dq);
  for (; col < end; col += kKeys) {
    const bool any = band.any(row, high, col, kKeys);
    float s[kTiles][kN][4], ds[kTiles][kN][4];
    wait_copies<1>();  // v is there
    __syncthreads();
    if (any) {
      clear<kTiles, kN>(ds);
      add_product_transposed<kTiles, kN>(ds, dout, in_tile, v);
    }
    wait_copies<0>();  // k is there
    __syncthreads();
    load_v(col + kKeys);
    if (any) {
      clear<kTiles, kN>(s);
      add_product_transposed<kTiles, kN>(s, q, in_tile, k);
      each<kTiles, kN>(ds, [&](float& x, int t, int half, int) { x -= delta[t][half]; });
      multiply_slopes<kTiles, kN>(ds, s, scores);
      to_probabilities<kTiles, kN>(s, scores, [&](int t, int half, int) { return lse[t][half]; });
      if (!band.whole(row, high, col, kKeys)) hide<kTiles, kN>(s, ds, band, col, row_of);
      each_pair<kTiles, kN>(ds, s, [](float& d, float p) { d *= p; });
      uint32_t rounded[kTiles][kN / 2][4];
      round_to<T, kTiles, kN>(rounded, ds);
      add_product<kTiles, kN>(dq, rounded, k);
    }
    __syncthreads();
    load_k(col + kKeys);
  }
  wait_copies<0>();
  __syncthreads();
  each<kTiles, kM>(dq, [&](float& x, int, int, int) { x *= a.scale; });
  const int64_t stride = a.heads * a.dim;
  T* to = static_cast<T*>(a.dq) + int64_t(work.first_q + row) * stride + work.head * a.dim;
  store_rows<kTiles>(dq, q, in_tile, to, stride, work.len_q - row, int(a.dim));
}

// ---- launches ----

template <typename T, int D, typename S>
void launch_dkdv(const AttentionBackward& a, cudaStream_t stream) {
  const Schedule schedule(a, true, S::kRows);
  if (schedule.empty()) return;
  using Memory = Shared<sizeof(T) * D * 2 * (S::kRows + S::kQueries) + sizeof(float) * 2 * S::kQueries>;
  launch(attention_dkdv_kernel<T, D, S, Memory>, schedule.grid(), dim3(S::kThreads), Memory::kBytes, stream, a,
         schedule, Scores(a));
}

template <typename T, int D, typename S>
void launch_dq(const AttentionBackward& a, cudaStream_t stream) {
  const Schedule schedule(a, false, S::kRows);
  if (schedule.empty()) return;
  using Memory = Shared<sizeof(T) * D * 2 * (S::kRows + S::kKeys)>;
  launch(attention_dq_kernel<T, D, S, Memory>, schedule.grid(), dim3(S::kThreads), Memory::kBytes, stream, a, schedule,
         Scores(a));
}

// Each takes at most 99 KiB of shared memory, all that a block of compute capability 8.6, 8.9 and 12.0 has.
template <typename T, int D>
void backward(const AttentionBackward& a, cudaStream_t stream) {
  if constexpr (D == 64)
    launch_dkdv<T, D, KeysShape<4, 1, 64, false, 2>>(a, stream);
  else if constexpr (D <= 128)
    launch_dkdv<T, D, KeysShape<8, 1, D == 96 ? 48 : 32, false, 1>>(a, stream);
  else
    launch_dkdv<T, D, KeysShape<8, 1, D == 192 ? 48 : 16, true, 1>>(a, stream);
  if constexpr (D == 64)
    launch_dq<T, D, QueriesShape<4, 2, 32, 2>>(a, stream);
  else if constexpr (D <= 128)
    launch_dq<T, D, QueriesShape<8, 1, 64, 1>>(a, stream);
  else
    launch_dq<T, D, QueriesShape<4, 1, D == 192 ? 48 : 32, 1>>(a, stream);
}

#define FASTLLM_INSTANCE(T, D) template void backward<T, D>(const AttentionBackward&, cudaStream_t);
FASTLLM_EACH_ATTENTION(FASTLLM_INSTANCE)

}  // namespace fastllm::cuda::attention
