// Attention on NVIDIA GPUs of compute capability 8.0 and newer, float16 and bfloat16; the arguments are described in
// ../attention.h. The rows of q, k, v and dout are aligned to 16 bytes, their dims multiples of 8.
#pragma once

#include "../attention.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastllm::cuda {

void attention_forward(const AttentionForward& args, int device, CUstream_st* stream);
void attention_backward(const AttentionBackward& args, int device, CUstream_st* stream);
void attention_decode(const AttentionDecode& args, int device, CUstream_st* stream);

// Into how many parts attention_decode splits the keys; from two on it wants a workspace of
// [splits, sequences * len_q * heads, dim_v + 1] float32.
int64_t attention_splits(const Attention& args, int device);

}  // namespace fastllm::cuda
