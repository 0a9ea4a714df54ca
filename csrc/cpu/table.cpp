// The table of one instruction set.
#include "kernels.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {

void rms_norm_forward(const RmsNormForward&);
void rms_norm_backward(const RmsNormBackward&);

const Kernels kernels = {rms_norm_forward, rms_norm_backward};

}  // namespace fastllm::cpu::FASTLLM_ISA
