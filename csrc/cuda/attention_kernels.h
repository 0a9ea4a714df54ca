// The launches of one element type and padded dim, each compiled on its own: attention_forward.cu and so on.
#pragma once

#include <cuda_runtime.h>

#include "attention_parts.h"

namespace fastllm::cuda::attention {

// `seen` [sequences], or null: how many of the keys hold something.
template <typename T, int D>
void forward(const AttentionForward& args, const int64_t* seen, cudaStream_t stream);

// dq, and dk and dv, of what delta has been computed for.
template <typename T, int D>
void backward(const AttentionBackward& args, cudaStream_t stream);

template <typename T, int D>
void decode(const AttentionDecode& args, cudaStream_t stream);

}  // namespace fastllm::cuda::attention
