// The Python module fastllm.kernels._C: `cpu` and `cuda`, with functions of the same names and arguments.
// A function takes torch tensors (None: absent) and numbers, packs them into its kernel's struct of arguments and
// launches; its last two arguments are the device's index and the stream, which the CPU ignores.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "cross_entropy.h"
#include "jsd.h"
#include "linear.h"
#include "rms_norm.h"
#include "rope.h"
#include "softmax.h"
#include "swiglu.h"
#include "tensor_view.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
#ifndef FASTLLM_NO_CPU
#include "cpu/kernels.h"
#endif
#ifdef FASTLLM_CUDA
#include "cuda/attention.h"
#include "cuda/cross_entropy.h"
#include "cuda/jsd.h"
#include "cuda/rms_norm.h"
#include "cuda/rope.h"
#include "cuda/softmax.h"
#include "cuda/swiglu.h"
#endif

namespace py = pybind11;
using namespace fastllm;

namespace {

// Rows and columns of a tensor.
struct Matrix {
  int64_t rows = 1, cols;
  explicit Matrix(const TensorView& x) {
    const Dims n = x.sizes();
    for (Py_ssize_t i = 0; i + 1 < n.size(); ++i) rows *= n[i];
    cols = n[-1];
  }
};

// ---- the arguments of each kernel: the operator's, without the backend, then its outputs ----

RmsNormForward rms_norm_forward(const TensorView& x, const TensorView& weight, const TensorView& residual, float eps,
                                float weight_offset, const TensorView& y, const TensorView& h, const TensorView& rstd) {
  const auto [rows, cols] = Matrix(y);
  return {x.rows(), residual.rows(), weight.dense(), y.dense(), h.dense(), rstd.dense<float>(),
          rows, cols, eps, weight_offset, x.dtype(), residual ? residual.dtype() : x.dtype(), weight.dtype()};
}

RmsNormBackward rms_norm_backward(const TensorView& dy, const TensorView& x, const TensorView& weight,
                                  const TensorView& rstd, const TensorView& dh, float weight_offset,
                                  const TensorView& dx, const TensorView& dweight, const TensorView& workspace) {
  const auto [rows, cols] = Matrix(dx);
  return {dy.rows(), x.rows(), dh.rows(), weight.dense(), rstd.dense<float>(), dx.dense(), dweight.dense(),
          workspace.dense<float>(), workspace ? workspace.sizes()[0] : 0, rows, cols, weight_offset, dy.dtype(),
          x.dtype(), weight.dtype()};
}

SwigluForward swiglu_forward(const TensorView& gate, const TensorView& up, const TensorView& out) {
  const auto [rows, cols] = Matrix(out);
  return {gate.rows(), up.rows(), out.dense(), rows, cols, gate.dtype()};
}

SwigluBackward swiglu_backward(const TensorView& dout, const TensorView& gate, const TensorView& up,
                               const TensorView& dgate, const TensorView& dup) {
  const auto [rows, cols] = Matrix(dgate);
  return {dout.rows(), gate.rows(), up.rows(), dgate.dense(), dup.dense(), rows, cols, gate.dtype()};
}

// x and out may be one: [..., seq, heads, cols], as rows.
Rope rope(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& positions,
          bool interleaved, bool inverse, const TensorView& out, int64_t seq, int64_t heads) {
  const auto [rows, cols] = Matrix(x);
  const Dims table = cos.sizes();
  return {x.rows(), out.rows(), cos.dense<float>(), sin.dense<float>(), positions.dense<int64_t>(), rows, cols, heads,
          seq, table[1], table[0], interleaved, inverse, x.dtype()};
}

using AttentionOptions = std::tuple<float, int64_t, int64_t, float>;  // kernels/attention/options.py

// The farthest key that a query sees to one side; what no int32 holds, or is negative, is no bound.
int64_t bound(int64_t keys) { return keys < 0 || keys >= INT32_MAX ? kUnbounded : keys; }

Attention attention(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& sinks,
                    const TensorView& cu_q, const TensorView& cu_k, const AttentionOptions& options) {
  const auto [scale, left, right, softcap] = options;
  const Dims n = q.sizes(), m = k.sizes();
  const int64_t sequences = cu_q ? cu_q.numel() - 1 : n[0];
  return {q.heads(), k.heads(), v.heads(), sinks.dense<float>(), cu_q.dense<int64_t>(), cu_k.dense<int64_t>(),
          sequences, n[-3], m[-3], n[-2], m[-2], n[-1], v.sizes()[-1], scale, softcap, bound(left), bound(right),
          q.dtype()};
}

AttentionForward attention_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                                   const TensorView& sinks, const TensorView& cu_q, const TensorView& cu_k,
                                   const AttentionOptions& options, const TensorView& out, const TensorView& lse) {
  AttentionForward a{attention(q, k, v, sinks, cu_q, cu_k, options), out.dense(), lse.dense<float>()};
  a.dim_v = out.sizes()[-1];  // that of v may be padded
  return a;
}

AttentionBackward attention_backward(const TensorView& dout, const TensorView& dlse, const TensorView& q,
                                     const TensorView& k, const TensorView& v, const TensorView& out,
                                     const TensorView& lse, const TensorView& cu_q, const TensorView& cu_k,
                                     const AttentionOptions& options, const TensorView& dq, const TensorView& dk,
                                     const TensorView& dv, const TensorView& delta) {
  AttentionBackward a{attention(q, k, v, {}, cu_q, cu_k, options), dout.heads(), out.dense(), lse.dense<float>(),
                      dlse.dense<float>(), delta.dense<float>(), dq.dense(), dk.dense(), dv.dense()};
  a.dim = dq.sizes()[-1], a.dim_v = dv.sizes()[-1];  // those of q, k and v may be padded
  return a;
}

AttentionDecode attention_decode(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& seen,
                                 const TensorView& table, const TensorView& sinks, const AttentionOptions& options,
                                 const TensorView& parts, const TensorView& out, const TensorView& lse) {
  AttentionDecode a{attention(q, k, v, sinks, {}, {}, options), seen.dense<int64_t>(), table.dense<int32_t>()};
  a.parts = parts.dense<float>(), a.splits = parts ? parts.sizes()[0] : 1;
  a.out = out.dense(), a.lse = lse.dense<float>();
  a.dim_v = out.sizes()[-1];
  if (table) {
    a.columns = table.sizes()[1], a.pages = k.sizes()[0];
    while (int64_t(1) << a.page_shift < a.len_k) ++a.page_shift;
    a.len_k *= a.columns;
  }
  return a;
}

// weight is of another length where it was packed for another product.
Linear linear(const TensorView& x, const TensorView& weight, const TensorView& scales, const TensorView& bias,
              bool gated, const TensorView& out) {
  const Matrix product(out);
  const Linear a{x.rows(), weight.dense(), scales.dense<float>(), bias.dense(), out.dense(), product.rows,
                 x.sizes()[-1], product.cols, x.dtype(), out.dtype() == DType::float32, gated};
  if (weight.numel() != a.panels() * a.packed_depth() * Linear::kFeatures) {
    throw py::value_error("a kernel was given a weight that is not packed for this product");
  }
  return a;
}

// On a CPU a page outside the pool is an error; nothing is read there.
void check_pages(const AttentionDecode& a) {
  if (!a.table || !a.heads || !a.len_q) return;
  for (int64_t s = 0; s < a.sequences; ++s) {
    for (int64_t i = a.first_of(s) >> a.page_shift; i << a.page_shift < a.seen_of(s); ++i) {
      const int64_t page = a.table[s * a.columns + i];
      if (page < 0 || page >= a.pages) {
        throw std::out_of_range("flash_decode: block_table holds " + std::to_string(page) + ", k_cache and v_cache hold " +
                                std::to_string(a.pages) + " pages");
      }
    }
  }
}

SoftmaxForward softmax_forward(const TensorView& x, const TensorView& mask, int mask_kind, float scale, bool causal,
                               const TensorView& y) {
  const auto [rows, cols] = Matrix(y);
  return {x.rows(), mask.mask(mask_kind), y.dense(), rows, cols, causal ? y.sizes()[-2] : 0, scale, x.dtype()};
}

SoftmaxBackward softmax_backward(const TensorView& dy, const TensorView& y, float scale, bool causal,
                                 const TensorView& dx) {
  const auto [rows, cols] = Matrix(dx);
  return {dy.rows(), y.rows(), dx.dense(), rows, cols, causal ? dx.sizes()[-2] : 0, scale, y.dtype()};
}

// kernels/loss/options.py
using CrossEntropyOptions = std::tuple<int64_t, float, float, float, float, int64_t, int64_t>;

CrossEntropy cross_entropy(const TensorView& logits, const TensorView& target, const TensorView& class_weight,
                           const TensorView& mean_weight, const CrossEntropyOptions& options) {
  const auto [ignore_index, label_smoothing, z_loss, softcap, scale, first_class, classes] = options;
  return {logits.rows(), target.dense<int64_t>(), class_weight.dense<float>(), mean_weight.dense<float>(),
          target.numel(), logits.sizes()[-1], ignore_index, label_smoothing, z_loss, softcap, scale, first_class,
          classes, logits.dtype()};
}

CrossEntropyForward cross_entropy_forward(const TensorView& logits, const TensorView& target,
                                          const TensorView& class_weight, const TensorView& mean_weight,
                                          const CrossEntropyOptions& options, const TensorView& loss,
                                          const TensorView& lse, const TensorView& entropy) {
  return {cross_entropy(logits, target, class_weight, mean_weight, options), loss.dense<float>(), lse.dense<float>(),
          entropy.dense<float>()};
}

CrossEntropyBackward cross_entropy_backward(const TensorView& logits, const TensorView& target,
                                            const TensorView& class_weight, const TensorView& mean_weight,
                                            const TensorView& lse, const TensorView& dloss, const TensorView& dlse,
                                            const TensorView& dentropy, const TensorView& entropy,
                                            const CrossEntropyOptions& options, const TensorView& dlogits) {
  return {cross_entropy(logits, target, class_weight, mean_weight, options), lse.dense<float>(), dloss.data<float>(),
          dloss ? dloss.strides()[0] : 0, dlse.dense<float>(), dentropy.dense<float>(), entropy.dense<float>(),
          dlogits.dense()};
}

using Divergence = std::tuple<float, float, float>;  // kernels/loss/options.py

Jsd jsd(const TensorView& student, const TensorView& teacher, const TensorView& mask, const TensorView& dloss,
        const Divergence& divergence, const TensorView& loss, const TensorView& dlogits) {
  const auto [rows, cols] = Matrix(student);
  const auto [teacher_share, student_share, scale] = divergence;
  return {student.dense(), teacher.dense(), static_cast<const uint8_t*>(mask.dense()), dloss.data<float>(), dloss ? dloss.strides()[0] : 0,
          loss.dense<float>(), dlogits.dense(), rows, cols, teacher_share, student_share, scale, student.dtype()};
}

void check_position(const char* op, int64_t position, int64_t max_seq) {
  if (position >= 0 && position < max_seq) return;
  throw std::out_of_range(std::string(op) + ": positions holds " + std::to_string(position) + ", cos and sin hold " +
                          std::to_string(max_seq) + " positions");
}

// On a CPU a position outside the tables is an error; nothing is read there.
void check_positions(const Rope& a) {
  if (!a.positions || !a.heads) return;
  for (int64_t token = 0; token < a.rows / a.heads; ++token) check_position("rope", a.positions[token], a.max_seq);
}

// Cosines and sines are [max_seq, half]; q [tokens, heads, dim], caches [pages, page_size, kv_heads, dim].
RopeAppend rope_append(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cos,
                       const TensorView& sin, const TensorView& positions, const TensorView& slots,
                       const TensorView& k_cache, const TensorView& v_cache, bool interleaved, const TensorView& out) {
  const Dims n = q.sizes(), cache = k_cache.sizes(), table = cos.sizes();
  return {q.heads(), k.heads(), v.heads(), k_cache.heads(), v_cache.heads(), cos.dense<float>(), sin.dense<float>(),
          positions.dense<int64_t>(), slots.dense<int64_t>(), out.dense(), n[0], n[1], cache[2], n[2], table[1],
          table[0], cache[0], cache[1], interleaved, q.dtype()};
}

// Before anything is written.
void check_append(const RopeAppend& a) {
  for (int64_t token = 0; token < a.tokens; ++token) {
    check_position("rope_append", a.positions[token], a.max_seq);
    if (a.slots[token] >= a.pages * a.page_size) {
      throw std::out_of_range("rope_append: slots holds " + std::to_string(a.slots[token]) +
                              ", k_cache and v_cache hold " + std::to_string(a.pages * a.page_size) + " tokens");
    }
  }
}

// The launches of a thread's block, to be made again on the same memory: what a CUDA graph is on a GPU. It holds on to
// the tensors.
class Recording {
 public:
  void enter() {
    if (current) throw std::runtime_error("a recording is being made in this thread");
    current = this;
  }
  void exit() { current = nullptr; }
  size_t size() const { return launches_.size(); }

  void replay() const {
    py::gil_scoped_release released;
    for (const auto& launch : launches_) launch();
  }

  template <typename Packed, typename Launch, typename... Args>
  void add(const Packed& packed, const Launch& launch, int device, uintptr_t stream, const Args&... args) {
    (keep(args), ...);
    launches_.push_back([packed, launch, device, stream] { launch(packed, device, stream); });
  }

  static inline thread_local Recording* current = nullptr;

 private:
  void keep(const TensorView& x) {
    if (x) kept_.push_back(x.object());
  }
  template <typename T>
  void keep(const T&) {}

  std::vector<std::function<void()>> launches_;
  std::vector<py::object> kept_;
};

// A module function (Args..., device, stream): packs Args with `pack`, releases the GIL, and launches.
template <typename Packed, typename... Args, typename Launch>
void def_launch(py::module_& m, const char* name, Packed (*pack)(Args...), Launch launch) {
  m.def(name, [pack, launch](std::decay_t<Args>... args, int device, uintptr_t stream) {
    const Packed packed = pack(args...);
    if (Recording::current) Recording::current->add(packed, launch, device, stream, args...);
    py::gil_scoped_release released;
    launch(packed, device, stream);
  });
}

#ifndef FASTLLM_NO_CPU
template <typename Packed, typename... Args>
void def_cpu(py::module_& m, const char* name, Packed (*pack)(Args...), void (*cpu::Kernels::*kernel)(const Packed&)) {
  def_launch(m, name, pack, [kernel](const Packed& a, int, uintptr_t) { (cpu::kernels().*kernel)(a); });
}
#endif

#ifdef FASTLLM_CUDA
template <typename Packed, typename... Args>
void def_cuda(py::module_& m, const char* name, Packed (*pack)(Args...),
              void (*kernel)(const Packed&, int, CUstream_st*)) {
  def_launch(m, name, pack, [kernel](const Packed& a, int device, uintptr_t stream) {
    kernel(a, device, reinterpret_cast<CUstream_st*>(stream));
  });
}
#endif

}  // namespace

PYBIND11_MODULE(FASTLLM_MODULE_NAME, m) {
  m.doc() = "Native kernels of fastllm: C++ for CPUs, CUDA C++ for NVIDIA GPUs.";
  python_names();

  py::class_<Recording>(m, "Recording", "Launches, to be made again on the same tensors.")
      .def(py::init<>())
      .def("__enter__", [](Recording& r) { r.enter(); })
      .def("__exit__", [](Recording& r, const py::args&) { r.exit(); })
      .def("__len__", &Recording::size)
      .def("replay", &Recording::replay);

#ifndef FASTLLM_NO_CPU
  auto on_cpu = m.def_submodule("cpu", "C++ kernels for CPUs.");
  on_cpu.def("instruction_sets", &cpu::instruction_sets, "Those that this processor runs, the best last.");
  on_cpu.def("instruction_set", &cpu::instruction_set, "The one in use.");
  on_cpu.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"));
#if defined(_OPENMP)
  on_cpu.def("release_threads", [] { omp_pause_resource_all(omp_pause_soft); });
#else
  on_cpu.def("release_threads", [] {});
#endif
  on_cpu.def("rms_norm_partials", [](const TensorView& x, int) { return cpu::rms_norm_partials(Matrix(x).rows); });
  def_cpu(on_cpu, "rms_norm_forward", rms_norm_forward, &cpu::Kernels::rms_norm_forward);
  def_cpu(on_cpu, "rms_norm_backward", rms_norm_backward, &cpu::Kernels::rms_norm_backward);
  def_cpu(on_cpu, "softmax_forward", softmax_forward, &cpu::Kernels::softmax_forward);
  def_cpu(on_cpu, "softmax_backward", softmax_backward, &cpu::Kernels::softmax_backward);
  def_cpu(on_cpu, "cross_entropy_forward", cross_entropy_forward, &cpu::Kernels::cross_entropy_forward);
  def_cpu(on_cpu, "cross_entropy_backward", cross_entropy_backward, &cpu::Kernels::cross_entropy_backward);
  def_cpu(on_cpu, "jsd", jsd, &cpu::Kernels::jsd);
  def_cpu(on_cpu, "attention_forward", attention_forward, &cpu::Kernels::attention_forward);
  def_cpu(on_cpu, "attention_backward", attention_backward, &cpu::Kernels::attention_backward);
  def_launch(on_cpu, "attention_decode", attention_decode, [](const AttentionDecode& a, int, uintptr_t) {
    check_pages(a);
    cpu::kernels().attention_decode(a);
  });
  def_cpu(on_cpu, "linear", linear, &cpu::Kernels::linear);
  def_cpu(on_cpu, "swiglu_forward", swiglu_forward, &cpu::Kernels::swiglu_forward);
  def_cpu(on_cpu, "swiglu_backward", swiglu_backward, &cpu::Kernels::swiglu_backward);
  def_launch(on_cpu, "rope", rope, [](const Rope& a, int, uintptr_t) {
    check_positions(a);
    cpu::kernels().rope(a);
  });
  def_launch(on_cpu, "rope_append", rope_append, [](const RopeAppend& a, int, uintptr_t) {
    check_append(a);
    cpu::kernels().rope_append(a);
  });
#endif

#ifdef FASTLLM_CUDA
  auto on_cuda = m.def_submodule("cuda", "CUDA C++ kernels for NVIDIA GPUs.");
  on_cuda.attr("archs") = FASTLLM_CUDA_ARCHS;
  on_cuda.def("rms_norm_partials", [](const TensorView& x, int device) {
    const auto [rows, cols] = Matrix(x);
    return cuda::rms_norm_partials(rows, cols, x.dtype(), device);
  });
  def_cuda(on_cuda, "rms_norm_forward", rms_norm_forward, cuda::rms_norm_forward);
  def_cuda(on_cuda, "rms_norm_backward", rms_norm_backward, cuda::rms_norm_backward);
  on_cuda.def("attention_splits", [](const TensorView& q, const TensorView& k, const TensorView& v,
                                     const AttentionOptions& options, int device) {
    return cuda::attention_splits(attention(q, k, v, {}, {}, {}, options), device);
  });
  def_cuda(on_cuda, "attention_forward", attention_forward, cuda::attention_forward);
  def_cuda(on_cuda, "attention_backward", attention_backward, cuda::attention_backward);
  def_cuda(on_cuda, "attention_decode", attention_decode, cuda::attention_decode);
  def_cuda(on_cuda, "softmax_forward", softmax_forward, cuda::softmax_forward);
  def_cuda(on_cuda, "softmax_backward", softmax_backward, cuda::softmax_backward);
  def_cuda(on_cuda, "cross_entropy_forward", cross_entropy_forward, cuda::cross_entropy_forward);
  def_cuda(on_cuda, "cross_entropy_backward", cross_entropy_backward, cuda::cross_entropy_backward);
  def_cuda(on_cuda, "jsd", jsd, cuda::jsd);
  def_cuda(on_cuda, "swiglu_forward", swiglu_forward, cuda::swiglu_forward);
  def_cuda(on_cuda, "swiglu_backward", swiglu_backward, cuda::swiglu_backward);
  def_cuda(on_cuda, "rope", rope, cuda::rope);
#endif
}
