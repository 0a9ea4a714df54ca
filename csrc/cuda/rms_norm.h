// RMSNorm on NVIDIA GPUs; the arguments are described in ../rms_norm.h.
#pragma once

#include <cstdint>

#include "../rms_norm.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastllm::cuda {

void rms_norm_forward(const RmsNormForward& args, int device, CUstream_st* stream);
void rms_norm_backward(const RmsNormBackward& args, int device, CUstream_st* stream);

// Rows of workspace that the backward wants for the weight's gradient.
int64_t rms_norm_partials(int64_t rows, int64_t cols, DType dtype, int device);

}  // namespace fastllm::cuda
