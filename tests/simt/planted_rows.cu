// Calls the kernels whose rows a cluster shares, in float32, for test_planted_row_faults.py.
#include <exception>
#include <string>

#include "cuda/cross_entropy.h"
#include "cuda/rms_norm.h"
#include "cuda/softmax.h"

int planted = 0;

using namespace fastllm;

struct Tensors {  // contiguous [rows, cols]; weight and dweight [cols]
  const float *x, *dy, *weight, *rstd;
  const int64_t* target;
  float *out, *each;     // [rows]
  float *dweight, *workspace;
};

// Pass 0 and 1 are softmax forward and backward, 2 and 3 RMSNorm, 4 cross-entropy. The error's message, or null.
extern "C" __attribute__((visibility("default"))) const char* run(int pass, int fault, Tensors t, int64_t rows,
                                                                  int64_t cols, int64_t partials) {
  static std::string message;
  planted = fault;
  const auto all = [&](const float* data) { return Rows{data, 1, cols, 0}; };
  const DType f = DType::float32;
  try {
    if (pass == 0) cuda::softmax_forward({all(t.x), {}, t.out, rows, cols, 0, 1.0f, f}, 0, nullptr);
    if (pass == 1) cuda::softmax_backward({all(t.dy), all(t.x), t.out, rows, cols, 0, 1.0f, f}, 0, nullptr);
    if (pass == 2)
      cuda::rms_norm_forward({all(t.x), {}, t.weight, t.out, nullptr, t.each, rows, cols, 0.0f, 0.0f, f, f, f}, 0,
                             nullptr);
    if (pass == 3)
      cuda::rms_norm_backward({all(t.dy), all(t.x), {}, t.weight, t.rstd, t.out, t.dweight, t.workspace, partials, rows,
                               cols, 0.0f, f, f, f},
                              0, nullptr);
    if (pass == 4) {
      const CrossEntropy a{all(t.x), t.target, nullptr, nullptr, rows, cols, -100, 0.1f, 0.0f, 0.0f, 1.0f, 0, cols, f};
      cuda::cross_entropy_forward({a, t.each, t.out, t.out + rows}, 0, nullptr);
    }
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
