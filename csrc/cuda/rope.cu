// Rotary position embedding: bound by memory, one read and one write in 16-byte accesses. A thread turns the same
// pairs of several heads, so that it reads the tables, which are as wide as a head, once for them.

#include "rope.h"

#include <algorithm>

#include "divide.h"
#include "launch.h"
#include "vec.h"

namespace fastllm::cuda {
namespace rope_ {

constexpr int kHeads = 4;      // of a thread
constexpr int kThreads = 128;  // of a block

// V pairs as they are in memory: two vectors, apart by half a head or one after the other.
template <typename T, int V>
struct Pairs {
  Vec<T, V> first, second;
};

template <typename T, int V, bool kInterleaved>
__device__ inline Pairs<T, V> turned(const Pairs<T, V>& pairs, const Floats<V>& cos, const Floats<V>& sin) {
  Floats<V> halves[2] = {unpack(pairs.first), unpack(pairs.second)};
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float& a = kInterleaved ? halves[2 * j / V].at[2 * j % V] : halves[0].at[j];
    float& b = kInterleaved ? halves[(2 * j + 1) / V].at[(2 * j + 1) % V] : halves[1].at[j];
    const float before = a;
    a = before * cos.at[j] - b * sin.at[j];
    b = b * cos.at[j] + before * sin.at[j];
  }
  return {pack<T>(halves[0]), pack<T>(halves[1])};
}

// V entries of a table; NaN where there is no such position.
template <int V>
__device__ inline Floats<V> entries(const float* table, bool there, int64_t at) {
  return there ? unpack(load_readonly<V>(table + at)) : filled<V>(NAN);
}

// The rows from one on, in turn, by one division; of those past the end, none is read.
template <typename T>
struct RowAfterRow {
  const T* at;
  int64_t rest, inner, stride, jump;

  __device__ RowAfterRow(const Rows& rows, int64_t row) : inner(rows.inner.value), stride(rows.inner_stride) {
    const Divided divided = divide(row, rows.inner);
    rest = divided.rest;
    at = static_cast<const T*>(rows.data) + divided.quotient * rows.outer_stride + rest * stride;
    jump = rows.outer_stride - (inner - 1) * stride;
  }
  __device__ const T* next() {
    const T* now = at;
    const bool last = ++rest == inner;
    at += last ? jump : stride;
    if (last) rest = 0;
    return now;
  }
};

// groups: how many of kHeads heads a token has
template <typename T, int V, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rope_turn(const Rope a, const Divisor groups) {
  const Divided item = divide(int64_t(blockIdx.x) * blockDim.y + threadIdx.y, groups);
  const int64_t token = item.quotient, row = token * a.heads + item.rest * kHeads;
  if (row >= a.rows) return;
  const int64_t left = (token + 1) * a.heads - row;
  const int heads = left < kHeads ? int(left) : kHeads;
  const T* from[kHeads];
  T* to[kHeads];
  RowAfterRow<T> from_row(a.x, row), to_row(a.out, row);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    from[h] = from_row.next();
    to[h] = const_cast<T*>(to_row.next());
  }
  const int64_t position = a.positions ? a.positions[token] : divide(token, a.seq).rest;
  const bool there = position >= 0 && position < a.max_seq;

  const int64_t apart = kInterleaved ? V : a.half;
  for (int64_t i = threadIdx.x * V; i < a.half; i += blockDim.x * V) {
    const int64_t at = kInterleaved ? 2 * i : i;
    Pairs<T, V> pairs[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
      if (h < heads) pairs[h] = {load<V>(from[h] + at), load<V>(from[h] + at + apart)};
    const Floats<V> cos = entries<V>(a.cos, there, position * a.half + i);
    Floats<V> sin = entries<V>(a.sin, there, position * a.half + i);
#pragma unroll
    for (int j = 0; j < V; ++j) sin.at[j] = a.inverse ? -sin.at[j] : sin.at[j];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= heads) continue;
      const Pairs<T, V> out = turned<T, V, kInterleaved>(pairs[h], cos, sin);
      store(to[h] + at, out.first);
      store(to[h] + at + apart, out.second);
    }
  }
  if (a.x.data == a.out.data) return;
#pragma unroll 1  // to unroll it, the compiler would divide
  for (int64_t col = 2 * a.half + threadIdx.x * V; col < a.cols; col += blockDim.x * V)
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
      if (h < heads) store(to[h] + col, load<V>(from[h] + col));
}

template <typename T, int V>
void launch_turn(const Rope& a, cudaStream_t stream) {
  const dim3 block = block_for(std::max(a.half, a.cols - 2 * a.half) / V, 1, kThreads, kThreads);
  const int64_t groups = ceil_div(a.heads, kHeads), items = a.rows / a.heads * groups;
  const dim3 grid(unsigned(ceil_div(items, block.y)));
  launch(a.interleaved ? rope_turn<T, V, true> : rope_turn<T, V, false>, grid, block, 0,
         stream, a, groups);
}

template <typename T>
void turn(const Rope& a, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const bool whole = a.cols % V == 0 && a.half % V == 0 && aligned(a.x, sizeof(T)) && aligned(a.out, sizeof(T)) &&
                     aligned(a.cos) && aligned(a.sin);
  whole ? launch_turn<T, V>(a, stream) : launch_turn<T, 1>(a, stream);
}

}  // namespace rope_

void rope(const Rope& a, int device, cudaStream_t stream) {
  if (a.rows * a.cols == 0) return;
  DeviceGuard guard(device);
  visit(a.dtype, [&](auto element) { rope_::turn<decltype(element)>(a, stream); });
}

}  // namespace fastllm::cuda
