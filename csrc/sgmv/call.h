// The sgmv ops as C++ functions that go through torch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <vector>

namespace pylora::sgmv {

using at::Tensor;
using at::TensorList;

inline void call_add(const Tensor& y, const Tensor& x, TensorList a, TensorList b, const Tensor& ranks,
                     const Tensor& scalings, const Tensor& indptr, const Tensor& slots, bool out_first) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pylora::sgmv_", "")
                             .typed<void(const Tensor&, const Tensor&, TensorList, TensorList, const Tensor&,
                                         const Tensor&, const Tensor&, const Tensor&, bool)>();
  op.call(y, x, a, b, ranks, scalings, indptr, slots, out_first);
}

inline Tensor call_shrink(const Tensor& x, TensorList a, const Tensor& ranks, const Tensor& indptr,
                          const Tensor& slots) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pylora::sgmv_shrink", "")
                             .typed<Tensor(const Tensor&, TensorList, const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(x, a, ranks, indptr, slots);
}

inline void call_expand(const Tensor& y, const Tensor& v, TensorList b, const Tensor& ranks, const Tensor& scalings,
                        const Tensor& indptr, const Tensor& slots, bool out_first) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pylora::sgmv_expand_", "")
                             .typed<void(const Tensor&, const Tensor&, TensorList, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, bool)>();
  op.call(y, v, b, ranks, scalings, indptr, slots, out_first);
}

/// As pybind11 calls them.
using Tensors = std::vector<Tensor>;
inline void eager_add(const Tensor& y, const Tensor& x, const Tensors& a, const Tensors& b, const Tensor& ranks,
                      const Tensor& scalings, const Tensor& indptr, const Tensor& slots, bool out_first) {
  call_add(y, x, a, b, ranks, scalings, indptr, slots, out_first);
}
inline Tensor eager_shrink(const Tensor& x, const Tensors& a, const Tensor& ranks, const Tensor& indptr,
                           const Tensor& slots) {
  return call_shrink(x, a, ranks, indptr, slots);
}
inline void eager_expand(const Tensor& y, const Tensor& v, const Tensors& b, const Tensor& ranks,
                         const Tensor& scalings, const Tensor& indptr, const Tensor& slots, bool out_first) {
  call_expand(y, v, b, ranks, scalings, indptr, slots, out_first);
}

}  // namespace pylora::sgmv
