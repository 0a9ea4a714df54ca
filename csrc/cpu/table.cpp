// The table of one instruction set.
#include "kernels.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {

void rms_norm_forward(const RmsNormForward&);
void rms_norm_backward(const RmsNormBackward&);
void rope(const Rope&);
void swiglu_forward(const SwigluForward&);
void swiglu_backward(const SwigluBackward&);

const Kernels kernels = {rms_norm_forward, rms_norm_backward, rope, swiglu_forward, swiglu_backward};

}  // namespace fastllm::cpu::FASTLLM_ISA
