// SwiGLU on NVIDIA GPUs; the arguments are described in ../swiglu.h.
#pragma once

#include "../swiglu.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastllm::cuda {

void swiglu_forward(const SwigluForward& args, int device, CUstream_st* stream);
void swiglu_backward(const SwigluBackward& args, int device, CUstream_st* stream);

}  // namespace fastllm::cuda
