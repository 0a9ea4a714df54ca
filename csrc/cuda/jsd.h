// The Jensen-Shannon divergence of logits on NVIDIA GPUs; the arguments are described in ../jsd.h.
#pragma once

#include "../jsd.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastllm::cuda {

void jsd(const Jsd& args, int device, CUstream_st* stream);

}  // namespace fastllm::cuda
