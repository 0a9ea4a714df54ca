// The Python module fastllm.kernels._C: `cpu` and `cuda`, with functions of the same names and arguments.
// Tensors come as addresses, sizes and strides (kernels/native.py); the last two arguments of a launch are
// the device's index and the stream, which the CPU ignores.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "attention.h"
#include "cross_entropy.h"
#include "rms_norm.h"
#include "rope.h"
#include "softmax.h"
#include "swiglu.h"
#ifndef FASTLLM_NO_CPU
#include "cpu/kernels.h"
#endif
#ifdef FASTLLM_CUDA
#include "cuda/cross_entropy.h"
#include "cuda/rms_norm.h"
#include "cuda/rope.h"
#include "cuda/softmax.h"
#include "cuda/swiglu.h"
#endif

namespace py = pybind11;
using namespace fastllm;

namespace {

using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Rows rows_of(const RowsTuple& t) { return {pointer(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }

RmsNormForward rms_norm_forward_arguments(const RowsTuple& x, const RowsTuple& residual, uintptr_t weight, uintptr_t y,
                                          uintptr_t h, uintptr_t rstd, int64_t rows, int64_t cols, float eps,
                                          float weight_offset, int dtype, int weight_dtype) {
  return {rows_of(x),   rows_of(residual), pointer(weight), pointer(y),    pointer(h),         pointer<float>(rstd), rows,
          cols,         eps,               weight_offset,   DType(dtype), DType(weight_dtype)};
}

RmsNormBackward rms_norm_backward_arguments(const RowsTuple& dy, const RowsTuple& x, const RowsTuple& dh,
                                            uintptr_t weight, uintptr_t rstd, uintptr_t dx, uintptr_t dweight,
                                            uintptr_t workspace, int64_t partials, int64_t rows, int64_t cols,
                                            float weight_offset, int dtype, int weight_dtype) {
  return {rows_of(dy),      rows_of(x),   rows_of(dh),
          pointer(weight),  pointer<float>(rstd), pointer(dx),
          pointer(dweight), pointer<float>(workspace), partials,
          rows,             cols,         weight_offset,
          DType(dtype),     DType(weight_dtype)};
}

SwigluForward swiglu_forward_arguments(const RowsTuple& gate, const RowsTuple& up, uintptr_t out, int64_t rows,
                                       int64_t cols, int dtype) {
  return {rows_of(gate), rows_of(up), pointer(out), rows, cols, DType(dtype)};
}

SwigluBackward swiglu_backward_arguments(const RowsTuple& dout, const RowsTuple& gate, const RowsTuple& up,
                                         uintptr_t dgate, uintptr_t dup, int64_t rows, int64_t cols, int dtype) {
  return {rows_of(dout), rows_of(gate), rows_of(up), pointer(dgate), pointer(dup), rows, cols, DType(dtype)};
}

Rope rope_arguments(const RowsTuple& x, const RowsTuple& out, uintptr_t cos, uintptr_t sin, uintptr_t positions,
                    int64_t rows, int64_t cols, int64_t heads, int64_t seq, int64_t half, int64_t max_seq,
                    bool interleaved, bool inverse, int dtype) {
  return {rows_of(x), rows_of(out), pointer<float>(cos), pointer<float>(sin), pointer<int64_t>(positions), rows, cols,
          heads, seq, half, max_seq, interleaved, inverse, DType(dtype)};
}

using HeadsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

Heads heads_of(const HeadsTuple& t) { return {pointer(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }

// sequences, len_q, len_k, heads, kv_heads, dim, and the options: scale, causal, window, softcap
using AttentionSizes = std::array<int64_t, 6>;
using AttentionOptions = std::tuple<float, bool, int64_t, float>;

Attention attention_of(const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v, uintptr_t sinks, uintptr_t cu_q,
                       uintptr_t cu_k, const AttentionSizes& n, const AttentionOptions& options, int dtype) {
  const auto [scale, causal, window, softcap] = options;
  return {heads_of(q), heads_of(k), heads_of(v), pointer<float>(sinks), pointer<int64_t>(cu_q), pointer<int64_t>(cu_k),
          n[0], n[1], n[2], n[3], n[4], n[5], scale, softcap, causal, window, DType(dtype)};
}

AttentionForward attention_forward_arguments(const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v,
                                             uintptr_t sinks, uintptr_t cu_q, uintptr_t cu_k, uintptr_t out,
                                             uintptr_t lse, const AttentionSizes& sizes,
                                             const AttentionOptions& options, int dtype) {
  return {attention_of(q, k, v, sinks, cu_q, cu_k, sizes, options, dtype), pointer(out), pointer<float>(lse)};
}

AttentionBackward attention_backward_arguments(const HeadsTuple& dout, const HeadsTuple& q, const HeadsTuple& k,
                                               const HeadsTuple& v, uintptr_t cu_q, uintptr_t cu_k, uintptr_t out,
                                               uintptr_t lse, uintptr_t dlse, uintptr_t delta, uintptr_t dq,
                                               uintptr_t dk, uintptr_t dv, const AttentionSizes& sizes,
                                               const AttentionOptions& options, int dtype) {
  return {attention_of(q, k, v, 0, cu_q, cu_k, sizes, options, dtype),
          heads_of(dout),
          pointer(out),
          pointer<float>(lse),
          pointer<float>(dlse),
          pointer<float>(delta),
          pointer(dq),
          pointer(dk),
          pointer(dv)};
}

AttentionDecode attention_decode_arguments(const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v,
                                           uintptr_t sinks, uintptr_t seen, uintptr_t out, uintptr_t lse,
                                           const AttentionSizes& sizes, const AttentionOptions& options, int dtype) {
  return {attention_of(q, k, v, sinks, 0, 0, sizes, options, dtype), pointer<int64_t>(seen), pointer(out),
          pointer<float>(lse)};
}

using MaskTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int>;

Mask mask_of(const MaskTuple& t) {
  return {pointer(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t),
          std::get<4>(t),          std::get<5>(t), MaskKind(std::get<6>(t))};
}

SoftmaxForward softmax_forward_arguments(const RowsTuple& x, const MaskTuple& mask, uintptr_t y, int64_t rows,
                                         int64_t cols, int64_t queries, float scale, int dtype) {
  return {rows_of(x), mask_of(mask), pointer(y), rows, cols, queries, scale, DType(dtype)};
}

SoftmaxBackward softmax_backward_arguments(const RowsTuple& dy, const RowsTuple& y, uintptr_t dx, int64_t rows,
                                           int64_t cols, int64_t queries, float scale, int dtype) {
  return {rows_of(dy), rows_of(y), pointer(dx), rows, cols, queries, scale, DType(dtype)};
}

CrossEntropyForward cross_entropy_forward_arguments(const RowsTuple& logits, uintptr_t target, uintptr_t class_weight,
                                                    uintptr_t mean_weight, uintptr_t loss, uintptr_t lse, int64_t rows,
                                                    int64_t cols, int64_t ignore_index, float label_smoothing,
                                                    float z_loss, float softcap, int64_t first_class, int64_t classes,
                                                    int dtype) {
  return {{rows_of(logits), pointer<int64_t>(target), pointer<float>(class_weight), pointer<float>(mean_weight), rows,
           cols, ignore_index, label_smoothing, z_loss, softcap, first_class, classes, DType(dtype)},
          pointer<float>(loss),
          pointer<float>(lse)};
}

CrossEntropyBackward cross_entropy_backward_arguments(const RowsTuple& logits, uintptr_t target, uintptr_t class_weight,
                                                      uintptr_t mean_weight, uintptr_t lse, uintptr_t dloss,
                                                      int64_t dloss_stride, uintptr_t dlse, uintptr_t dlogits,
                                                      int64_t rows, int64_t cols, int64_t ignore_index,
                                                      float label_smoothing, float z_loss, float softcap,
                                                      int64_t first_class, int64_t classes, int dtype) {
  return {{rows_of(logits), pointer<int64_t>(target), pointer<float>(class_weight), pointer<float>(mean_weight), rows,
           cols, ignore_index, label_smoothing, z_loss, softcap, first_class, classes, DType(dtype)},
          pointer<float>(lse),
          pointer<float>(dloss),
          dloss_stride,
          pointer<float>(dlse),
          pointer(dlogits)};
}

// On a CPU a position outside the tables is an error; nothing is read there.
void check_positions(const Rope& a) {
  if (!a.positions) return;
  for (int64_t token = 0; token < a.rows / a.heads; ++token) {
    if (a.positions[token] < 0 || a.positions[token] >= a.max_seq) {
      throw std::out_of_range("rope: positions holds " + std::to_string(a.positions[token]) + ", cos and sin hold " +
                              std::to_string(a.max_seq) + " positions");
    }
  }
}

// A module function (Args..., device, stream): packs Args with `pack`, releases the GIL, and launches.
template <typename Packed, typename... Args, typename Launch>
void def_launch(py::module_& m, const char* name, Packed (*pack)(Args...), Launch launch) {
  m.def(name, [pack, launch](Args... args, int device, uintptr_t stream) {
    const Packed packed = pack(args...);
    py::gil_scoped_release released;
    launch(packed, device, stream);
  });
}

}  // namespace

PYBIND11_MODULE(FASTLLM_MODULE_NAME, m) {
  m.doc() = "Native kernels of fastllm: C++ for CPUs, CUDA C++ for NVIDIA GPUs.";

#ifndef FASTLLM_NO_CPU
  auto on_cpu = m.def_submodule("cpu", "C++ kernels for CPUs.");
  on_cpu.def("instruction_sets", &cpu::instruction_sets, "Those that this processor runs, the best last.");
  on_cpu.def("instruction_set", &cpu::instruction_set, "The one in use.");
  on_cpu.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"));
  on_cpu.def("rms_norm_partials", [](int64_t rows, int64_t, int, int) { return cpu::rms_norm_partials(rows); });
  def_launch(on_cpu, "rms_norm_forward", rms_norm_forward_arguments,
             [](const RmsNormForward& a, int, uintptr_t) { cpu::kernels().rms_norm_forward(a); });
  def_launch(on_cpu, "rms_norm_backward", rms_norm_backward_arguments,
             [](const RmsNormBackward& a, int, uintptr_t) { cpu::kernels().rms_norm_backward(a); });
  def_launch(on_cpu, "softmax_forward", softmax_forward_arguments,
             [](const SoftmaxForward& a, int, uintptr_t) { cpu::kernels().softmax_forward(a); });
  def_launch(on_cpu, "softmax_backward", softmax_backward_arguments,
             [](const SoftmaxBackward& a, int, uintptr_t) { cpu::kernels().softmax_backward(a); });
  def_launch(on_cpu, "cross_entropy_forward", cross_entropy_forward_arguments,
             [](const CrossEntropyForward& a, int, uintptr_t) { cpu::kernels().cross_entropy_forward(a); });
  def_launch(on_cpu, "cross_entropy_backward", cross_entropy_backward_arguments,
             [](const CrossEntropyBackward& a, int, uintptr_t) { cpu::kernels().cross_entropy_backward(a); });
  def_launch(on_cpu, "attention_forward", attention_forward_arguments,
             [](const AttentionForward& a, int, uintptr_t) { cpu::kernels().attention_forward(a); });
  def_launch(on_cpu, "attention_backward", attention_backward_arguments,
             [](const AttentionBackward& a, int, uintptr_t) { cpu::kernels().attention_backward(a); });
  def_launch(on_cpu, "attention_decode", attention_decode_arguments,
             [](const AttentionDecode& a, int, uintptr_t) { cpu::kernels().attention_decode(a); });
  def_launch(on_cpu, "rope", rope_arguments, [](const Rope& a, int, uintptr_t) {
    check_positions(a);
    cpu::kernels().rope(a);
  });
  def_launch(on_cpu, "swiglu_forward", swiglu_forward_arguments,
             [](const SwigluForward& a, int, uintptr_t) { cpu::kernels().swiglu_forward(a); });
  def_launch(on_cpu, "swiglu_backward", swiglu_backward_arguments,
             [](const SwigluBackward& a, int, uintptr_t) { cpu::kernels().swiglu_backward(a); });
#endif

#ifdef FASTLLM_CUDA
  auto on_cuda = m.def_submodule("cuda", "CUDA C++ kernels for NVIDIA GPUs.");
  on_cuda.attr("archs") = FASTLLM_CUDA_ARCHS;
  on_cuda.def("rms_norm_partials", [](int64_t rows, int64_t cols, int dtype, int device) {
    return cuda::rms_norm_partials(rows, cols, DType(dtype), device);
  });
  def_launch(on_cuda, "rms_norm_forward", rms_norm_forward_arguments,
             [](const RmsNormForward& a, int device, uintptr_t stream) {
               cuda::rms_norm_forward(a, device, pointer<CUstream_st>(stream));
             });
  def_launch(on_cuda, "rms_norm_backward", rms_norm_backward_arguments,
             [](const RmsNormBackward& a, int device, uintptr_t stream) {
               cuda::rms_norm_backward(a, device, pointer<CUstream_st>(stream));
             });
  def_launch(on_cuda, "softmax_forward", softmax_forward_arguments,
             [](const SoftmaxForward& a, int device, uintptr_t stream) {
               cuda::softmax_forward(a, device, pointer<CUstream_st>(stream));
             });
  def_launch(on_cuda, "softmax_backward", softmax_backward_arguments,
             [](const SoftmaxBackward& a, int device, uintptr_t stream) {
               cuda::softmax_backward(a, device, pointer<CUstream_st>(stream));
             });
  def_launch(on_cuda, "cross_entropy_forward", cross_entropy_forward_arguments,
             [](const CrossEntropyForward& a, int device, uintptr_t stream) {
               cuda::cross_entropy_forward(a, device, pointer<CUstream_st>(stream));
             });
  def_launch(on_cuda, "cross_entropy_backward", cross_entropy_backward_arguments,
             [](const CrossEntropyBackward& a, int device, uintptr_t stream) {
               cuda::cross_entropy_backward(a, device, pointer<CUstream_st>(stream));
             });
  def_launch(on_cuda, "rope", rope_arguments, [](const Rope& a, int device, uintptr_t stream) {
    cuda::rope(a, device, pointer<CUstream_st>(stream));
  });
  def_launch(on_cuda, "swiglu_forward", swiglu_forward_arguments,
             [](const SwigluForward& a, int device, uintptr_t stream) {
               cuda::swiglu_forward(a, device, pointer<CUstream_st>(stream));
             });
  def_launch(on_cuda, "swiglu_backward", swiglu_backward_arguments,
             [](const SwigluBackward& a, int device, uintptr_t stream) {
               cuda::swiglu_backward(a, device, pointer<CUstream_st>(stream));
             });
#endif
}
