// multi_lora: layers for a batch whose rows use different adapters, each adapter's factors where its layer keeps
// them. Nothing is stacked or copied: the kernels (cpu/segments.h, which has the numerics) take a pointer, a rank, a
// dtype and a scaling for each adapter, so that no change of an adapter can be missed.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "binding/tensors.h"

namespace pylora::multi_lora {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using Doubles = c10::ArrayRef<double>;
using variable_list = std::vector<Tensor>;

/// What every op of the family takes after its own arguments.
///   a, b        for each adapter of the batch: [rank, in], [out, rank]
///   scalings    one for each
///   dropout     one probability for each; empty: none
///   rng         int64 [2], where dropout is not 0
///   order       int32 [rows]: rows of the batch sorted by segment
///   indptr      int32 [segments + 1], in rows
///   slots       int32 [segments]: index in a and b, or -1
#define PYLORA_MULTI_LORA_ARGS                                                                                   \
  TensorList a, TensorList b, Doubles scalings, Doubles dropout, const OptionalTensor &rng, const Tensor &order, \
      const Tensor &indptr, const Tensor &slots
#define PYLORA_MULTI_LORA_TYPES \
  TensorList, TensorList, Doubles, Doubles, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&
#define PYLORA_MULTI_LORA_NAMES a, b, scalings, dropout, rng, order, indptr, slots

inline Tensor call_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, PYLORA_MULTI_LORA_ARGS) {
  static const auto op =
      binding::find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, PYLORA_MULTI_LORA_TYPES)>(
          "pylora::multi_lora_linear");
  return op.call(x, weight, bias, PYLORA_MULTI_LORA_NAMES);
}

inline std::tuple<Tensor, Tensor> call_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                               PYLORA_MULTI_LORA_ARGS) {
  static const auto op =
      binding::find_operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                        PYLORA_MULTI_LORA_TYPES)>("pylora::multi_lora_linear_forward");
  return op.call(x, weight, bias, PYLORA_MULTI_LORA_NAMES);
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;
inline Gradients call_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& v,
                               PYLORA_MULTI_LORA_ARGS, bool need_x, bool need_factors) {
  static const auto op =
      binding::find_operator<Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                       PYLORA_MULTI_LORA_TYPES, bool, bool)>("pylora::multi_lora_linear_backward");
  return op.call(dy, x, weight, v, PYLORA_MULTI_LORA_NAMES, need_x, need_factors);
}

/// The same for the ops that add to a layer's output and have no dropout.
#define PYLORA_SERVED_ARGS \
  TensorList a, TensorList b, Doubles scalings, const Tensor &order, const Tensor &indptr, const Tensor &slots
#define PYLORA_SERVED_TYPES TensorList, TensorList, Doubles, const Tensor&, const Tensor&, const Tensor&
#define PYLORA_SERVED_NAMES a, b, scalings, order, indptr, slots

using FactorGradients = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;

inline void call_embedding(const Tensor& y, const Tensor& tokens, PYLORA_SERVED_ARGS, int64_t padding_idx) {
  static const auto op = binding::find_operator<void(const Tensor&, const Tensor&, PYLORA_SERVED_TYPES, int64_t)>(
      "pylora::multi_lora_embedding_");
  op.call(y, tokens, PYLORA_SERVED_NAMES, padding_idx);
}

inline FactorGradients call_embedding_backward(const Tensor& dy, const Tensor& tokens, PYLORA_SERVED_ARGS,
                                               int64_t padding_idx) {
  static const auto op =
      binding::find_operator<FactorGradients(const Tensor&, const Tensor&, PYLORA_SERVED_TYPES, int64_t)>(
          "pylora::multi_lora_embedding_backward");
  return op.call(dy, tokens, PYLORA_SERVED_NAMES, padding_idx);
}

/// How a convolution slides: a number for each spatial dimension, padding with zeros on both sides.
#define PYLORA_SLIDING_ARGS at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups
#define PYLORA_SLIDING_TYPES at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t
#define PYLORA_SLIDING_NAMES stride, padding, dilation, groups

inline void call_conv(const Tensor& y, const Tensor& x, PYLORA_SERVED_ARGS, PYLORA_SLIDING_ARGS) {
  static const auto op =
      binding::find_operator<void(const Tensor&, const Tensor&, PYLORA_SERVED_TYPES, PYLORA_SLIDING_TYPES)>(
          "pylora::multi_lora_conv_");
  op.call(y, x, PYLORA_SERVED_NAMES, PYLORA_SLIDING_NAMES);
}

inline Gradients call_conv_backward(const Tensor& dy, const Tensor& x, PYLORA_SERVED_ARGS, PYLORA_SLIDING_ARGS,
                                    bool need_x) {
  static const auto op =
      binding::find_operator<Gradients(const Tensor&, const Tensor&, PYLORA_SERVED_TYPES, PYLORA_SLIDING_TYPES, bool)>(
          "pylora::multi_lora_conv_backward");
  return op.call(dy, x, PYLORA_SERVED_NAMES, PYLORA_SLIDING_NAMES, need_x);
}

/// As pybind11 calls them.
inline void eager_conv(const Tensor& y, const Tensor& x, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                       const std::vector<double>& scalings, const Tensor& order, const Tensor& indptr,
                       const Tensor& slots, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups) {
  call_conv(y, x, PYLORA_SERVED_NAMES, PYLORA_SLIDING_NAMES);
}
inline void eager_embedding(const Tensor& y, const Tensor& tokens, const std::vector<Tensor>& a,
                            const std::vector<Tensor>& b, const std::vector<double>& scalings, const Tensor& order,
                            const Tensor& indptr, const Tensor& slots, int64_t padding_idx) {
  call_embedding(y, tokens, PYLORA_SERVED_NAMES, padding_idx);
}
inline Tensor eager_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                           const std::vector<double>& scalings, const std::vector<double>& dropout,
                           const OptionalTensor& rng, const Tensor& order, const Tensor& indptr, const Tensor& slots) {
  return call_linear(x, weight, bias, PYLORA_MULTI_LORA_NAMES);
}

}  // namespace pylora::multi_lora
