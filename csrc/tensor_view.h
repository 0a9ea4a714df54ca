// A torch.Tensor as bindings.cpp sees it: asked for its address, sizes and strides through its Python methods, each
// when it is needed, because a torch header would tie the module to one version of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <utility>

#include "attention.h"
#include "softmax.h"
#include "tensor.h"

namespace fastllm {

// Sizes or strides; a negative index counts from the last.
class Dims {
 public:
  explicit Dims(pybind11::object tuple) : tuple_(std::move(tuple)) {}
  Py_ssize_t size() const { return PyTuple_GET_SIZE(tuple_.ptr()); }
  int64_t operator[](Py_ssize_t i) const { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple_.ptr(), i < 0 ? i + size() : i)); }

 private:
  pybind11::object tuple_;
};

// Names made into Python strings once, and torch's own objects. `python_names` is first called while the module loads.
struct PythonNames {
  PyObject* const numel = PyUnicode_InternFromString("numel");
  PyObject* const shape = PyUnicode_InternFromString("shape");
  PyObject* const stride = PyUnicode_InternFromString("stride");
  PyObject* const dtype = PyUnicode_InternFromString("dtype");
  PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* const is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* const float32 = torch("float32");
  PyObject* const float16 = torch("float16");
  PyObject* const bfloat16 = torch("bfloat16");
  PyObject* const int64 = torch("int64");
  PyObject* const int32 = torch("int32");

 private:
  static PyObject* torch(const char* name) {
    return pybind11::object(pybind11::module_::import("torch").attr(name)).release().ptr();
  }
};

inline const PythonNames& python_names() {
  static const PythonNames names;
  return names;
}

class TensorView {
 public:
  TensorView() = default;
  explicit TensorView(pybind11::handle tensor) : tensor_(tensor.is_none() ? nullptr : tensor.ptr()) {}

  explicit operator bool() const { return tensor_ != nullptr; }

  pybind11::object object() const { return pybind11::reinterpret_borrow<pybind11::object>(tensor_); }

  int64_t numel() const { return PyLong_AsLongLong(call(python_names().numel).ptr()); }
  Dims sizes() const { return Dims(attribute(python_names().shape)); }
  Dims strides() const { return Dims(call(python_names().stride)); }

  // Of a tensor that may be absent: float32, which nothing reads.
  DType dtype() const {
    if (!tensor_) return DType::float32;
    const pybind11::object found = attribute(python_names().dtype);
    if (found.ptr() == python_names().float32) return DType::float32;
    if (found.ptr() == python_names().float16) return DType::float16;
    if (found.ptr() == python_names().bfloat16) return DType::bfloat16;
    throw pybind11::type_error("a kernel was given a tensor of " + std::string(pybind11::str(found)));
  }

  // The address, whatever the strides; null of an absent tensor. Where T is a type, the elements have it.
  template <typename T = void>
  T* data() const {
    if (!tensor_) return nullptr;
    if constexpr (!std::is_void_v<T>) {
      static_assert(std::is_same_v<T, float> || std::is_same_v<T, int64_t> || std::is_same_v<T, int32_t>);
      PyObject* const expected = std::is_same_v<T, float>     ? python_names().float32
                                 : std::is_same_v<T, int64_t> ? python_names().int64
                                                              : python_names().int32;
      if (attribute(python_names().dtype).ptr() != expected) {
        throw pybind11::type_error("a kernel wants a tensor of " + std::string(pybind11::str(expected)));
      }
    }
    return static_cast<T*>(PyLong_AsVoidPtr(call(python_names().data_ptr).ptr()));
  }

  // The same of a contiguous tensor: what the kernel reads or writes from end to end.
  template <typename T = void>
  T* dense() const {
    if (tensor_ && !contiguous()) throw pybind11::value_error("a kernel was given a tensor that is not contiguous");
    return data<T>();
  }

  // Rows as native.as_rows gives them: contiguous, or [outer, inner, cols].
  Rows rows() const {
    if (!tensor_) return {};
    const Dims n = sizes();
    if (contiguous()) return {data(), 1, n[-1], 0};
    const Dims stride = strides();
    if (n.size() != 3) throw pybind11::value_error("a kernel was given rows that it can't address");
    return {data(), n[1], stride[0], stride[1]};
  }

  // [batch, tokens, heads, dim], or packed documents without the batch; the last dimension is contiguous. The stride of
  // a dimension of one can be any number: 0.
  Heads heads() const {
    const Dims n = sizes(), stride = strides();
    const auto step = [&](Py_ssize_t i) { return n[i] == 1 ? 0 : stride[i]; };
    return {data(), stride.size() == 4 ? step(0) : 0, step(-3), step(-2)};
  }

  // A mask as native.as_mask gives it: [outer, middle, inner, cols].
  Mask mask(int kind) const {
    if (!tensor_) return {};
    const Dims n = sizes(), stride = strides();
    return {data(), n[1], n[2], stride[0], stride[1], stride[2], MaskKind(kind)};
  }

 private:
  bool contiguous() const { return call(python_names().is_contiguous).ptr() == Py_True; }

  pybind11::object attribute(PyObject* name) const { return owned(PyObject_GetAttr(tensor_, name)); }
  pybind11::object call(PyObject* name) const { return owned(PyObject_CallMethodNoArgs(tensor_, name)); }

  static pybind11::object owned(PyObject* result) {
    if (!result) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(result);
  }

  PyObject* tensor_ = nullptr;
};

}  // namespace fastllm

namespace pybind11::detail {

template <>
struct type_caster<fastllm::TensorView> {
  PYBIND11_TYPE_CASTER(fastllm::TensorView, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value = fastllm::TensorView(source);
    return true;
  }
};

}  // namespace pybind11::detail
