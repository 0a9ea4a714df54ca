// Cross-entropy on NVIDIA GPUs; the arguments are described in ../cross_entropy.h.
#pragma once

#include "../cross_entropy.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastllm::cuda {

void cross_entropy_forward(const CrossEntropyForward& args, int device, CUstream_st* stream);
void cross_entropy_backward(const CrossEntropyBackward& args, int device, CUstream_st* stream);

}  // namespace fastllm::cuda
