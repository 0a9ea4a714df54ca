// Softmax on NVIDIA GPUs; the arguments are described in ../softmax.h.
#pragma once

#include "../softmax.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastllm::cuda {

void softmax_forward(const SoftmaxForward& args, int device, CUstream_st* stream);
void softmax_backward(const SoftmaxBackward& args, int device, CUstream_st* stream);

}  // namespace fastllm::cuda
