// The CPU kernels, as a table per instruction set; kernels() gives the fastest that this processor runs.
#pragma once

#include <string>
#include <vector>

#include "../attention.h"
#include "../cross_entropy.h"
#include "../jsd.h"
#include "../linear.h"
#include "../rms_norm.h"
#include "../rope.h"
#include "../softmax.h"
#include "../swiglu.h"

namespace fastllm::cpu {

struct Kernels {
  void (*rms_norm_forward)(const RmsNormForward&);
  void (*rms_norm_backward)(const RmsNormBackward&);
  void (*softmax_forward)(const SoftmaxForward&);
  void (*softmax_backward)(const SoftmaxBackward&);
  void (*cross_entropy_forward)(const CrossEntropyForward&);
  void (*cross_entropy_backward)(const CrossEntropyBackward&);
  void (*rope)(const Rope&);
  void (*rope_append)(const RopeAppend&);
  void (*swiglu_forward)(const SwigluForward&);
  void (*swiglu_backward)(const SwigluBackward&);
  void (*attention_forward)(const AttentionForward&);
  void (*attention_backward)(const AttentionBackward&);
  void (*attention_decode)(const AttentionDecode&);
  void (*linear)(const Linear&);
  void (*jsd)(const Jsd&);
};

namespace base { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }

const Kernels& kernels();

// The names of the instruction sets that this processor runs, the best last; the one in use; and a change
// of it, for tests and measurements.
std::vector<std::string> instruction_sets();
std::string instruction_set();
void use_instruction_set(const std::string& name);

// Rows of workspace for RmsNormBackward. A function of the shape alone, so that the weight's gradient does
// not depend on the number of threads.
inline int64_t rms_norm_partials(int64_t rows) {
  const int64_t partials = rows / 16;
  return partials < 1 ? 1 : partials > 64 ? 64 : partials;
}

}  // namespace fastllm::cpu
