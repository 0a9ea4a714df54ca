// Flash-Decoding (Dao et al. 2023): few queries against long keys, bound by the one read of those. A block has up to 16
// rows, queries of heads that share a key, and a part of the keys; each of its warps goes over keys of its own, which
// are copied to a place that is its own while it works on the keys before. The block adds up what its warps have found.

#include "attention_kernels.h"

namespace fastllm::cuda::attention {

constexpr int kDecodeRows = 16, kDecodeKeys = 16, kStages = 2;

template <int WARPS>
struct DecodeShape {
  static constexpr int kWarps = WARPS, kThreads = WARPS * kWarp;
  static constexpr int kStep = WARPS * kDecodeKeys;  // keys that the block takes at once
};

template <typename T, int D, typename S, typename Memory>
__global__ void __launch_bounds__(S::kThreads)
    attention_decode_kernel(const AttentionDecode a, const Scores scores, int heads_per_kv, int row_blocks) {
  constexpr int kN = kDecodeKeys / 8, kM = D / 8;
  const int split = blockIdx.x % int(a.splits), block = blockIdx.x / int(a.splits);
  const int first_row = block % row_blocks * kDecodeRows, item = block / row_blocks;
  const int kv_head = item % int(a.kv_heads), sequence = item / int(a.kv_heads);
  const int warp = int(threadIdx.x) / kWarp, lane = lane_id(), len_q = int(a.len_q);
  const int len_k = a.seen ? int(max(int64_t(0), min(a.seen[sequence], a.len_k))) : int(a.len_k);
  const int rows = min(kDecodeRows, len_q * heads_per_kv - first_row);

  const Band band{len_k - len_q, int(min(a.left, int64_t(kFar))), int(min(a.right, int64_t(kFar))), len_k};
  const auto query_of = [=](int row) { return (first_row + row) / heads_per_kv; };
  const auto head_of = [=](int row) { return kv_head * heads_per_kv + (first_row + row) % heads_per_kv; };
  const int low = query_of(0), high = query_of(rows - 1);
  int begin = band.first(low) / S::kStep * S::kStep, end = band.end(high);
  const int share = ((end - begin + S::kStep - 1) / S::kStep + int(a.splits) - 1) / int(a.splits) * S::kStep;
  begin += split * share;
  end = min(end, begin + share);

  const Tile<T, D> q{dynamic_shared<T>()}, stages{q.end(kDecodeRows)};
  const auto keys = [&](int stage) {
    return Tile<T, D>{stages.end((warp * kStages + stage) * 2 * kDecodeKeys)};
  };
  const auto values = [&](int stage) { return Tile<T, D>{keys(stage).end(kDecodeKeys)}; };
  const auto rows_of = [&](const Heads& x, int64_t dim) {
    return Source<T>{static_cast<const T*>(x.data) + sequence * x.batch + kv_head * x.head, x.token, int(dim)};
  };
  const Source<T> from_k = rows_of(a.k, a.dim), from_v = rows_of(a.v, a.dim_v);
  const auto load = [&](int stage, int col) {
    if (col < end) {
      load_tile<kDecodeKeys, kWarp>(keys(stage), from_k, col, len_k, lane);
      load_tile<kDecodeKeys, kWarp>(values(stage), from_v, col, len_k, lane);
    }
    commit_copies();
  };

  for (int i = threadIdx.x; i < kDecodeRows * q.kUnits; i += S::kThreads) {
    const int row = i / q.kUnits, unit = i % q.kUnits;
    const bool there = row < rows && unit * kUnit < a.dim;
    const int64_t from = there ? query_of(row) * a.q.token + head_of(row) * a.q.head + unit * kUnit : 0;
    copy_async(q.at(row, unit), static_cast<const T*>(a.q.data) + sequence * a.q.batch + from, there);
  }
  commit_copies();
  int col = begin + warp * kDecodeKeys;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) load(stage, col + stage * S::kStep);
  wait_copies<kStages>();
  __syncthreads();  // q is there

  float o[1][kM][4];
  clear<1, kM>(o);
  Softmax<1> softmax;
  const float factor = scores.fused() ? scores.factor : 1.0f;
  for (int stage = 0; col < end; col += S::kStep, stage = (stage + 1) % kStages) {
    wait_copies<kStages - 1>();
    __syncwarp();
    float s[1][kN][4];
    clear<1, kN>(s);
    add_product_transposed<1, kN>(s, q, 0, keys(stage));
    if (!scores.fused()) to_scores<1, kN>(s, scores);
    if (!band.whole(low, high, col, kDecodeKeys))
      mask<1, kN>(s, band, col, -INFINITY, [&](int, int half) { return query_of(half * 8 + lane_row()); });
    softmax.template add<kN, kM>(s, factor, o);
    uint32_t p[1][kN / 2][4];
    round_to<T, 1, kN>(p, s);
    add_product<1, kN>(o, p, values(stage));
    __syncwarp();
    load(stage, col + kStages * S::kStep);
  }
  wait_copies<0>();
  __syncthreads();

  // What each warp has found, then its weight in the block's sum, over the keys.
  float* const found = reinterpret_cast<float*>(stages.data);  // [warps, rows, D]
  float* const tops = found + S::kWarps * kDecodeRows * D;     // [warps, rows]
  float* const sums = tops + S::kWarps * kDecodeRows;          // the same
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * kDecodeRows + half * 8 + lane_row();
    const float sum = quad_reduce(Sum(), softmax.sum[0][half]);
    if (lane_col() == 0) tops[row] = softmax.top[0][half] * factor, sums[row] = sum;
#pragma unroll
    for (int n = 0; n < kM; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) found[row * D + n * 8 + lane_col() + c] = o[0][n][half * 2 + c];
  }
  __syncthreads();
  const int64_t all_rows = a.sequences * a.len_q * a.heads;
  // [sequence, query, head]
  const auto place_of = [&](int row) { return (int64_t(sequence) * len_q + query_of(row)) * a.heads + head_of(row); };
  if (threadIdx.x < rows) {
    const int row = threadIdx.x;
    const float sink = a.sinks && split == 0 ? a.sinks[head_of(row)] * kLog2e : -INFINITY;
    float top = sink;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) top = fmaxf(top, tops[w * kDecodeRows + row]);
    const float base = top == -INFINITY ? 0.0f : top;
    float sum = approximate_exp2(sink - base);
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w)
      sum = fmaf(sums[w * kDecodeRows + row], approximate_exp2(tops[w * kDecodeRows + row] - base), sum);
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) {
      const float weight = approximate_exp2(tops[w * kDecodeRows + row] - base);
      sums[w * kDecodeRows + row] = sum == 0.0f ? 0.0f : weight * reciprocal(sum);
    }
    const float lse = top + log2f(sum);
    if (a.parts)
      a.parts[a.splits * all_rows * a.dim_v + split * all_rows + place_of(row)] = lse;  // in base 2
    else if (a.lse)
      a.lse[(sequence * a.heads + head_of(row)) * a.len_q + query_of(row)] = lse * kLn2;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * int(a.dim_v); i += S::kThreads) {
    const int row = i / int(a.dim_v), c = i % int(a.dim_v);
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) value = fmaf(found[(w * kDecodeRows + row) * D + c], sums[w * kDecodeRows + row], value);
    const int64_t to = place_of(row) * a.dim_v + c;
    if (a.parts)
      a.parts[split * all_rows * a.dim_v + to] = value;
    else
      static_cast<T*>(a.out)[to] = from_float<T>(value);
  }
}

template <typename T, int D>
void decode(const AttentionDecode& a, cudaStream_t stream) {
  using S = DecodeShape<D == 64 ? 4 : 2>;  // to 128, two blocks fit a multiprocessor of 100 KiB
  const int64_t row_blocks = ceil_div(a.len_q * a.group(), kDecodeRows);
  constexpr size_t kStaged = sizeof(T) * D * S::kWarps * kStages * 2 * kDecodeKeys;
  constexpr size_t kFound = sizeof(float) * S::kWarps * kDecodeRows * (D + 2);
  using Memory = Shared<sizeof(T) * D * kDecodeRows + std::max(kStaged, kFound)>;
  const dim3 grid(unsigned(a.sequences * a.kv_heads * row_blocks * a.splits));
  launch(attention_decode_kernel<T, D, S, Memory>, grid, dim3(S::kThreads), Memory::kBytes, stream, a, Scores(a),
         int(a.group()), int(row_blocks));
}

#define FASTLLM_INSTANCE(T, D) template void decode<T, D>(const AttentionDecode&, cudaStream_t);
FASTLLM_EACH_ATTENTION(FASTLLM_INSTANCE)

}  // namespace fastllm::cuda::attention
