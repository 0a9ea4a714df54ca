// Flash attention, forward (Dao 2023, arXiv:2307.08691), on tensor cores by mma.sync. A block has the queries of one
// head and goes over the keys that they see, which are copied asynchronously: values while the scores are computed, the
// next keys while the softmax and the product with the values are. A warp has 16 TILES queries, whose scores and sums
// stay in its registers. README.md has the account of what bounds it.

#include "attention_kernels.h"

namespace fastllm::cuda::attention {

template <int WARPS, int TILES, int KEYS, int BLOCKS>
struct ForwardShape {
  static constexpr int kThreads = WARPS * kWarp, kTiles = TILES, kKeys = KEYS;
  static constexpr int kRows = WARPS * TILES * 16;
  static constexpr int kBlocks = BLOCKS;  // of a multiprocessor, as many as registers must allow
};

template <typename T, int D, typename S, typename Memory>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    attention_forward_kernel(const AttentionForward a, const Schedule schedule, const Scores scores,
                             const int64_t* seen) {
  constexpr int kTiles = S::kTiles, kKeys = S::kKeys, kN = kKeys / 8, kM = D / 8;
  const Work work(a, schedule, seen);
  if (work.none()) return;
  const Tile<T, D> q{dynamic_shared<T>()}, k{q.end(S::kRows)}, v{k.end(kKeys)};
  const int kv_head = work.head / schedule.heads_per_kv, warp = int(threadIdx.x) / kWarp;
  const auto from_q = work.source<T>(a, a.q, false, work.head, a.dim);
  const auto from_k = work.source<T>(a, a.k, true, kv_head, a.dim);
  const auto from_v = work.source<T>(a, a.v, true, kv_head, a.dim_v);
  const Band band = work.band(a);
  const int last = min(work.row + S::kRows, work.len_q) - 1;
  const int end = band.end(last);
  int col = band.first(work.row) / kKeys * kKeys;
  const int in_tile = warp * kTiles * 16, row = work.row + in_tile;  // the warp's first
  const int high = min(row + kTiles * 16 - 1, last);
  const auto row_of = [=](int t, int half) { return row + t * 16 + half * 8 + lane_row(); };

  load_tile<S::kRows, S::kThreads>(q, from_q, work.row, work.len_q);
  load_tile<kKeys, S::kThreads>(k, from_k, col, work.len_k);
  commit_copies();
  float o[kTiles][kM][4];
  clear<kTiles, kM>(o);
  Softmax<kTiles> softmax;
  const float factor = scores.fused() ? scores.factor : 1.0f;
  for (; col < end; col += kKeys) {
    wait_copies<0>();
    __syncthreads();
    load_tile<kKeys, S::kThreads>(v, from_v, col, work.len_k);
    commit_copies();
    const bool any = band.any(row, high, col, kKeys);
    float s[kTiles][kN][4];
    if (any) {
      clear<kTiles, kN>(s);
      add_product_transposed<kTiles, kN>(s, q, in_tile, k);
    }
    wait_copies<0>();
    __syncthreads();
    if (col + kKeys < end) load_tile<kKeys, S::kThreads>(k, from_k, col + kKeys, work.len_k);
    commit_copies();
    if (!any) continue;
    if (!scores.fused()) to_scores<kTiles, kN>(s, scores);
    if (!band.whole(row, high, col, kKeys)) mask<kTiles, kN>(s, band, col, -INFINITY, row_of);
    softmax.template add<kN, kM>(s, factor, o);
    uint32_t p[kTiles][kN / 2][4];
    round_to<T, kTiles, kN>(p, s);
    add_product<kTiles, kN>(o, p, v);
  }
  wait_copies<0>();
  __syncthreads();  // of a block that sees no key: q is there, and no copy comes after what is stored in its place

  const float sink = a.sinks ? a.sinks[work.head] * kLog2e : -INFINITY;
  float* lse = a.lse ? a.lse + work.statistics(a, work.head) : nullptr;
  float weight[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float own = softmax.top[t][half] * factor, top = fmaxf(own, sink);
      const float base = top == -INFINITY ? 0.0f : top, scale = approximate_exp2(own - base);
      const float sum = fmaf(quad_reduce(Sum(), softmax.sum[t][half]), scale, approximate_exp2(sink - base));
      weight[t][half] = sum == 0.0f ? 0.0f : scale * reciprocal(sum);
      const int r = row_of(t, half);
      if (lse && lane_col() == 0 && r < work.len_q) lse[r] = (top + log2f(sum)) * kLn2;
    }
  each<kTiles, kM>(o, [&](float& x, int t, int half, int) { x *= weight[t][half]; });
  const int64_t stride = a.heads * a.dim_v;
  T* out = static_cast<T*>(a.out) + int64_t(work.first_q + row) * stride + work.head * a.dim_v;
  store_rows<kTiles>(o, q, in_tile, out, stride, work.len_q - row, int(a.dim_v));
}

template <typename T, int D, typename S>
void launch_forward(const AttentionForward& a, const int64_t* seen, cudaStream_t stream) {
  const Schedule schedule(a, false, S::kRows);
  if (schedule.empty()) return;
  using Memory = Shared<sizeof(T) * D * (S::kRows + 2 * S::kKeys)>;
  launch(attention_forward_kernel<T, D, S, Memory>, schedule.grid(), dim3(S::kThreads), Memory::kBytes, stream, a,
         schedule, Scores(a), seen);
}

// Two row tiles of a warp share what it reads of keys and values, which is what bounds an A100: as many as registers
// hold. Each takes at most 48 KiB of shared memory, so that two blocks fit a multiprocessor of 100 KiB, or 96 KiB.
template <typename T, int D>
void forward(const AttentionForward& a, const int64_t* seen, cudaStream_t stream) {
  if constexpr (D <= 128)
    launch_forward<T, D, ForwardShape<4, 2, D == 128 ? 32 : 64, 2>>(a, seen, stream);
  else
    launch_forward<T, D, ForwardShape<8, 1, D == 192 ? 64 : 32, 1>>(a, seen, stream);
}

#define FASTLLM_INSTANCE(T, D) template void forward<T, D>(const AttentionForward&, const int64_t*, cudaStream_t);
FASTLLM_EACH_ATTENTION(FASTLLM_INSTANCE)

}  // namespace fastllm::cuda::attention
