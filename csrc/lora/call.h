// The lora ops as C++ functions that go through torch's dispatcher, so that autograd, autocast and tracing see the
// call.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace pylora::lora {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

inline Tensor call_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                          const Tensor& b, double scaling, double dropout_p, const OptionalTensor& rng) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                        const Tensor&, double, double, const OptionalTensor&)>("pylora::lora_linear");
  return op.call(x, weight, bias, a, b, scaling, dropout_p, rng);
}

inline Tensor call_add(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b, double scaling,
                       double dropout_p, const OptionalTensor& rng) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double,
                                        const OptionalTensor&)>("pylora::lora_add");
  return op.call(base, x, a, b, scaling, dropout_p, rng);
}

inline Tensor call_dropout(const Tensor& x, double dropout_p, const OptionalTensor& rng) {
  static const auto op = find_op<Tensor(const Tensor&, double, const OptionalTensor&)>("pylora::lora_dropout");
  return op.call(x, dropout_p, rng);
}

}  // namespace pylora::lora
