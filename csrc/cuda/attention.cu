// What attention does beside its tensor-core kernels, which are compiled one by one: delta, the sum over the parts of
// flash_decode, and the choice of a kernel by element type and dim.

#include "attention.h"

#include <stdexcept>

#include "attention_kernels.h"

namespace fastllm::cuda {
namespace attention {

constexpr int kWarpsOfBlock = 8;
constexpr int kFewRows = 64;      // of one head of the keys, up to which they are split
constexpr int kMostSplits = 64;
constexpr int kSplitKeys = 64;    // the fewest keys of a part

// delta = dout · out - dlse, a warp for each row of a head; V elements at a time.
template <typename T, int V>
__global__ void __launch_bounds__(kWarpsOfBlock* kWarp) attention_delta_kernel(const AttentionBackward a, int rows) {
  const int row = blockIdx.x * kWarpsOfBlock + threadIdx.x / kWarp;  // [tokens, heads]
  if (row >= rows) return;
  const int heads = int(a.heads), len_q = int(a.len_q), token = row / heads, head = row % heads;
  const int sequence = a.cu_q ? 0 : token / len_q, query = token - sequence * len_q;
  const T* dout = static_cast<const T*>(a.dout.data) + sequence * a.dout.batch + query * a.dout.token + head * a.dout.head;
  const T* out = static_cast<const T*>(a.out) + row * a.dim_v;
  float sum = 0.0f;
  for (int c = lane_id() * V; c < a.dim_v; c += kWarp * V) {
    const Floats<V> x = unpack(load<V>(dout + c)), y = unpack(load<V>(out + c));
#pragma unroll
    for (int j = 0; j < V; ++j) sum = fmaf(x.at[j], y.at[j], sum);
  }
  sum = warp_reduce(Sum(), sum);
  const int to = (sequence * heads + head) * len_q + query;
  if (lane_id() == 0) a.delta[to] = a.dlse ? sum - a.dlse[to] : sum;
}

// The parts of a row, each weighted by its share of the sum of exponentials; a warp for each row and 32 columns.
template <typename T>
__global__ void __launch_bounds__(kWarpsOfBlock* kWarp) attention_combine_kernel(const AttentionDecode a, int rows) {
  constexpr int kEach = kMostSplits / kWarp;
  const int row = blockIdx.x * kWarpsOfBlock + threadIdx.x / kWarp;  // [sequences, queries, heads]
  if (row >= rows) return;
  const int lane = lane_id(), c = blockIdx.y * kWarp + lane;
  const int splits = int(a.splits), dim = int(a.dim_v), heads = int(a.heads), len_q = int(a.len_q);
  const float* part_lse = a.parts + int64_t(splits) * rows * dim + row;
  float weight[kEach], top = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int split = i * kWarp + lane;
    weight[i] = split < splits ? part_lse[int64_t(split) * rows] : -INFINITY;
    top = fmaxf(top, weight[i]);
  }
  top = warp_reduce(Max(), top);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    weight[i] = approximate_exp2(weight[i] - (top == -INFINITY ? 0.0f : top));
    sum += weight[i];
  }
  sum = warp_reduce(Sum(), sum);
  const float share = sum == 0.0f ? 0.0f : reciprocal(sum);
  const int head = row % heads, token = row / heads;  // lse is [sequences, heads, queries]
  if (a.lse && c == 0) a.lse[(token / len_q * heads + head) * len_q + token % len_q] = (top + log2f(sum)) * kLn2;
  const float* part = a.parts + int64_t(row) * dim + min(c, dim - 1);
  const int64_t step = int64_t(rows) * dim;
  float value = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int end = min(splits - i * kWarp, kWarp);
#pragma unroll 8  // loads that wait together
    for (int split = 0; split < end; ++split, part += step)
      value = fmaf(__shfl_sync(0xffffffffu, weight[i], split), *part, value);
  }
  if (c < dim) static_cast<T*>(a.out)[int64_t(row) * dim + c] = from_float<T>(value * share);
}

// Calls f(element, dim) with the kernels' element type and the smallest of their dims that holds a call's.
template <typename F>
void visit_kernels(const Attention& a, F f) {
  const auto with_dim = [&](auto element) {
    const int64_t dim = std::max(a.dim, a.dim_v);
    if (dim <= 64) return f(element, std::integral_constant<int, 64>());
    if (dim <= 96) return f(element, std::integral_constant<int, 96>());
    if (dim <= 128) return f(element, std::integral_constant<int, 128>());
    if (dim <= 192) return f(element, std::integral_constant<int, 192>());
    if (dim <= 256) return f(element, std::integral_constant<int, 256>());
    throw std::invalid_argument("attention: a dim over 256");
  };
  if (a.dtype == DType::float32) throw std::invalid_argument("attention: float32");
  if (a.dtype == DType::float16) return with_dim(__half());
  return with_dim(__nv_bfloat16());
}

void check_rows(const Heads& x) {
  if (!aligned(x.data) || (x.batch | x.token | x.head) % kUnit != 0)
    throw std::invalid_argument("attention: rows that are not aligned to 16 bytes");
}

// Queries of all heads: rows of out.
int rows_of(const Attention& a) {
  const int64_t rows = a.tokens_q() * a.heads;
  // Kernels count rows in 32 bits, and positions so that sums of two fit.
  if (rows > INT32_MAX || std::max(a.tokens_k(), a.tokens_q()) >= kFar)
    throw std::invalid_argument("attention: more than 2^30 tokens of q or k, or 2^31 of all heads of q");
  return int(rows);
}

void check_rows(const Attention& a) {
  check_rows(a.q), check_rows(a.k), check_rows(a.v);
}

void run_forward(const AttentionForward& a, const int64_t* seen, cudaStream_t stream) {
  check_rows(a);
  visit_kernels(a, [&](auto element, auto dim) { forward<decltype(element), dim.value>(a, seen, stream); });
}

}  // namespace attention

void attention_forward(const AttentionForward& a, int device, cudaStream_t stream) {
  if (attention::rows_of(a) == 0) return;
  DeviceGuard guard(device);
  attention::run_forward(a, nullptr, stream);
}

void attention_backward(const AttentionBackward& a, int device, cudaStream_t stream) {
  using namespace attention;
  DeviceGuard guard(device);
  check_rows(a), check_rows(a.dout);
  const int rows = rows_of(a);
  visit_kernels(a, [&](auto element, auto dim) {
    using T = decltype(element);
    if (rows != 0) {
      const auto kernel = a.dim_v % kUnit == 0 ? attention_delta_kernel<T, kUnit> : attention_delta_kernel<T, 1>;
      launch(kernel, dim3(unsigned(ceil_div(rows, kWarpsOfBlock))), dim3(kWarpsOfBlock * kWarp), 0, stream, a, rows);
    }
    backward<T, dim.value>(a, stream);
  });
}

int64_t attention_splits(const Attention& a, int device) {
  using namespace attention;
  const int64_t rows = a.len_q * a.group();
  if (rows == 0 || rows > kFewRows) return 1;
  const int64_t blocks = a.sequences * a.kv_heads * ceil_div(rows, 16);
  const int64_t keys = std::min(a.len_k, a.left + a.right + a.len_q);
  const int64_t most = std::min<int64_t>(ceil_div(keys, kSplitKeys), kMostSplits);
  const int of_sm = std::max(a.dim, a.dim_v) <= 128 ? 2 : 1;  // blocks that fit every multiprocessor
  return std::max<int64_t>(1, std::min(of_sm * sm_count(device) / std::max<int64_t>(1, blocks), most));
}

void attention_decode(const AttentionDecode& a, int device, cudaStream_t stream) {
  using namespace attention;
  if (rows_of(a) == 0) return;
  DeviceGuard guard(device);
  if (a.len_q * a.group() > kFewRows) return run_forward({a, a.out, a.lse}, a.seen, stream);
  check_rows(a);
  visit_kernels(a, [&](auto element, auto dim) {
    using T = decltype(element);
    decode<T, dim.value>(a, stream);
    const int rows = rows_of(a);
    if (a.splits > 1)
      launch(attention_combine_kernel<T>,
             dim3(unsigned(ceil_div(rows, kWarpsOfBlock)), unsigned(ceil_div(a.dim_v, kWarp))),
             dim3(kWarpsOfBlock * kWarp), 0, stream, a, rows);
  });
}

}  // namespace fastllm::cuda
