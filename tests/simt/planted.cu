// Calls attention's kernels, of one element type and dim, for test_planted_faults.py.
#include <exception>
#include <string>

#include "cuda/attention_kernels.h"

int planted = 0;

using namespace fastllm;
using Element = FASTLLM_ELEMENT;

struct Tensors {  // contiguous, of one sequence
  const void *q, *k, *v, *dout;
  void* out;
  float *lse, *delta;
  void *dq, *dk, *dv;
};

struct Sizes {
  int64_t len_q, len_k, heads, kv_heads, left, right;
};

static Heads heads(const void* data, int64_t heads) { return {data, 0, heads * FASTLLM_DIM, FASTLLM_DIM}; }

// Pass 0 is the forward one, 1 the backward one, 2 decoding. The error's message, or null.
extern "C" __attribute__((visibility("default"))) const char* run(int pass, int fault, Tensors t, Sizes n) {
  static std::string message;
  planted = fault;
  const Attention a{heads(t.q, n.heads), heads(t.k, n.kv_heads), heads(t.v, n.kv_heads), nullptr, nullptr, nullptr, 1,
                    n.len_q, n.len_k, n.heads, n.kv_heads, FASTLLM_DIM, FASTLLM_DIM, 0.125f, 0.0f, n.left, n.right,
                    DType::bfloat16};
  try {
    if (pass == 0)
      cuda::attention::forward<Element, FASTLLM_DIM>({a, t.out, t.lse}, nullptr, {});
    else if (pass == 1)
      cuda::attention::backward<Element, FASTLLM_DIM>(
          {a, heads(t.dout, n.heads), t.out, t.lse, nullptr, t.delta, t.dq, t.dk, t.dv}, {});
    else
      cuda::attention::decode<Element, FASTLLM_DIM>({a, nullptr, nullptr, 0, 0, 0, nullptr, 1, t.out, t.lse}, {});
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
