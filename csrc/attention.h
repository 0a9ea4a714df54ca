// Attention, forward and backward: out = softmax(scores) v with scores = cap(scale * q kᵀ), where cap is
// softcap * tanh(x / softcap) or nothing. Query i of a sequence stands at key position p = i + len_k - len_q and sees
// the keys p - left to p + right (causal: right = 0). A query that sees no key gives 0.
// Sequences are the batch, or documents packed along the tokens, which cu_q and cu_k delimit.
#pragma once

#include "tensor.h"

namespace fastllm {

// [batch, tokens, heads, dim] in place: strides in elements, the last one is 1. Packed documents have no batch.
struct Heads {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

// A window that reaches farther is unbounded: longer sequences have no place in memory.
constexpr int64_t kUnbounded = int64_t(1) << 60;

struct Attention {
  Heads q, k, v;
  const float* sinks;          // [heads]: a logit that only adds to the sum; or null
  const int64_t *cu_q, *cu_k;  // [sequences + 1], where documents begin and end; or null
  int64_t sequences, len_q, len_k;  // of packed documents: tokens in all
  int64_t heads, kv_heads, dim, dim_v;  // dim of q and k, dim_v of v and out
  float scale, softcap;                 // softcap 0: none
  int64_t left, right;                  // from 0 to kUnbounded
  DType dtype;

  int64_t group() const { return kv_heads ? heads / kv_heads : 0; }  // heads of q that share one of k and v

  int64_t tokens_q() const { return cu_q ? len_q : sequences * len_q; }
  int64_t tokens_k() const { return cu_k ? len_k : sequences * len_k; }
};

// out is contiguous [batch, len_q, heads, dim_v], lse [batch, heads, len_q] (packed: both without the batch);
// a null lse is not wanted.
struct AttentionForward : Attention {
  void* out;
  float* lse;
};

// dq, dk and dv are contiguous, in the shapes of q, k and v; delta, dout · out less dlse, is like lse.
struct AttentionBackward : Attention {
  Heads dout;
  const void* out;
  const float *lse, *dlse;  // dlse: null where lse has no gradient
  float* delta;
  void *dq, *dk, *dv;
};

// A few queries against long sequences of keys: seen [batch] of the len_k keys hold something, the last query
// stands at the last of them. Keys are split in parts.
// With a table, k and v are pools of pages, [pages, page_size, kv_heads, dim], and `batch` of their Heads goes from page
// to page: key i of sequence s is in page table[s * columns + i / page_size]. The CUDA C++ kernels take no table.
struct AttentionDecode : Attention {
  const int64_t* seen = nullptr;   // or null: all
  const int32_t* table = nullptr;  // [batch, columns], or null
  int64_t columns = 0, pages = 0;
  int page_shift = 0;      // page_size is 2^page_shift
  float* parts = nullptr;  // on a GPU [splits, sequences * len_q * heads, dim_v + 1], or null: one part
  int64_t splits = 1;
  void* out = nullptr;
  float* lse = nullptr;

  int64_t seen_of(int64_t s) const {
    const int64_t n = seen ? seen[s] : len_k;
    return n < 0 ? 0 : n > len_k ? len_k : n;
  }
  // The first key that a query of sequence s sees, if any.
  int64_t first_of(int64_t s) const {
    const int64_t first = seen_of(s) - len_q - left;
    return first < 0 ? 0 : first;
  }
};

}  // namespace fastllm
