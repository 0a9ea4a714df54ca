// Rotary position embedding on NVIDIA GPUs; the arguments are described in ../rope.h.
#pragma once

#include "../rope.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastllm::cuda {

// A token whose position is outside the tables becomes NaN; nothing is read there.
void rope(const Rope& args, int device, CUstream_st* stream);

}  // namespace fastllm::cuda
