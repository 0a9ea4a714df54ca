// The linear layer of inference: out = x wᵀ · scales + bias, sums in float32. out is contiguous [rows, out_features].
// A gated one is SwiGLU's: silu(x gateᵀ) · (x wᵀ), without bias.
//
// The weight is packed in panels of kFeatures output features, an array [panels, packed_depth, kFeatures] with zeros
// where there is nothing: one layout for all instruction sets. In bfloat16 two steps of the depth are interleaved,
// [panels, packed_depth / 2, kFeatures, 2]. With scales, one for each output feature, it is int8, whatever dtype is.
// Half of a gated weight's panel are features of the gate, the other half the same features of w; the scales of all of
// the gate come before those of w.
#pragma once

#include "tensor.h"

namespace fastllm {

struct Linear {
  Rows x;
  const void* weight;
  const float* scales;  // or null
  const void* bias;     // [out_features] in dtype, or null
  void* out;
  int64_t rows, in_features, out_features;
  DType dtype;  // of x and bias; of out too, but where
  bool wide;    // out is float32
  bool gated;

  static constexpr int kFeatures = 32;

  int panel_features() const { return gated ? kFeatures / 2 : kFeatures; }  // of out
  int64_t panels() const { return (out_features + panel_features() - 1) / panel_features(); }
  // What an instruction takes of the depth at once divides it.
  int64_t packed_depth() const {
    return scales || dtype == DType::bfloat16 ? (in_features + 31) / 32 * 32 : in_features;
  }
};

}  // namespace fastllm
