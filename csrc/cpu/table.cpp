// The table of one instruction set.
#include "kernels.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {

void rms_norm_forward(const RmsNormForward&);
void rms_norm_backward(const RmsNormBackward&);
void softmax_forward(const SoftmaxForward&);
void softmax_backward(const SoftmaxBackward&);
void cross_entropy_forward(const CrossEntropyForward&);
void cross_entropy_backward(const CrossEntropyBackward&);
void rope(const Rope&);
void rope_append(const RopeAppend&);
void swiglu_forward(const SwigluForward&);
void swiglu_backward(const SwigluBackward&);
void attention_forward(const AttentionForward&);
void attention_backward(const AttentionBackward&);
void attention_decode(const AttentionDecode&);
void linear(const Linear&);
void jsd(const Jsd&);

const Kernels kernels = {rms_norm_forward,      rms_norm_backward,      softmax_forward,
                         softmax_backward,      cross_entropy_forward,  cross_entropy_backward,
                         rope,                  rope_append,            swiglu_forward,
                         swiglu_backward,       attention_forward,      attention_backward,
                         attention_decode,      linear,                 jsd};

}  // namespace fastllm::cpu::FASTLLM_ISA
