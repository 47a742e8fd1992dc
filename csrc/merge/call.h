// The merge ops as C++ functions that go through torch's dispatcher, so that tracing sees the call.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <vector>

namespace pylora::merge {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using RowScales = c10::List<std::optional<Tensor>>;
using EagerRowScales = std::vector<std::optional<Tensor>>;
using Tensors = std::vector<Tensor>;
using Scalings = std::vector<double>;

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

inline Tensor call_merge(Tensor w, const Tensors& a, const Tensors& b, const Scalings& scalings,
                         const EagerRowScales& row_scales, bool log) {
  static const auto op =
      find_op<Tensor(Tensor&, at::TensorList, at::TensorList, at::ArrayRef<double>, const RowScales&, bool)>(
          "pylora::merge_");
  return op.call(w, a, b, scalings, RowScales(row_scales), log);
}

inline void call_unmerge(Tensor w, const Tensors& a, const Tensors& b, const Scalings& scalings,
                         const EagerRowScales& row_scales, const OptionalTensor& log) {
  static const auto op = find_op<void(Tensor&, at::TensorList, at::TensorList, at::ArrayRef<double>, const RowScales&,
                                      const OptionalTensor&)>("pylora::unmerge_");
  op.call(w, a, b, scalings, RowScales(row_scales), log);
}

inline Tensor call_swap(Tensor w, const Tensors& old_a, const Tensors& old_b, const Scalings& old_scalings,
                        const EagerRowScales& old_row_scales, const OptionalTensor& old_log, const Tensors& a,
                        const Tensors& b, const Scalings& scalings, const EagerRowScales& row_scales, bool log) {
  static const auto op = find_op<Tensor(Tensor&, at::TensorList, at::TensorList, at::ArrayRef<double>, const RowScales&,
                                        const OptionalTensor&, at::TensorList, at::TensorList, at::ArrayRef<double>,
                                        const RowScales&, bool)>("pylora::swap_");
  return op.call(w, old_a, old_b, old_scalings, RowScales(old_row_scales), old_log, a, b, scalings,
                 RowScales(row_scales), log);
}

inline bool call_is_finite(const Tensor& w, const Tensors& a, const Tensors& b, const Scalings& scalings,
                           const EagerRowScales& row_scales) {
  static const auto op =
      find_op<bool(const Tensor&, at::TensorList, at::TensorList, at::ArrayRef<double>, const RowScales&)>(
          "pylora::merge_is_finite");
  return op.call(w, a, b, scalings, RowScales(row_scales));
}

}  // namespace pylora::merge
