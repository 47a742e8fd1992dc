// The dora ops, and those of lora that they are made of, as C++ functions that go through torch's dispatcher.
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include "binding/tensors.h"

namespace pylora::dora {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Tensor call_row_squares(const Tensor& weight) {
  static const auto op = binding::find_operator<Tensor(const Tensor&)>("pylora::dora_row_squares");
  return op.call(weight);
}

inline Tensor call_row_norms(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling) {
  static const auto op =
      binding::find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, double)>("pylora::dora_row_norms");
  return op.call(weight, a, b, scaling);
}

inline Tensor call_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                          const Tensor& b, const Tensor& magnitude, const Tensor& norms, double scaling,
                          double dropout_p, const OptionalTensor& rng) {
  static const auto op =
      binding::find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                    const Tensor&, const Tensor&, double, double, const OptionalTensor&)>(
          "pylora::dora_linear");
  return op.call(x, weight, bias, a, b, magnitude, norms, scaling, dropout_p, rng);
}

inline std::tuple<Tensor, Tensor> call_linear_norms(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    const Tensor& a, const Tensor& b, const Tensor& magnitude,
                                                    const OptionalTensor& squares, double scaling, double dropout_p,
                                                    const OptionalTensor& rng) {
  static const auto op = binding::find_operator<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
      const OptionalTensor&, double, double, const OptionalTensor&)>("pylora::dora_linear_norms");
  return op.call(x, weight, bias, a, b, magnitude, squares, scaling, dropout_p, rng);
}

/// y, z, v and the norms, empty where they were given.
using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline ForwardResults call_linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& a, const Tensor& b, const Tensor& magnitude,
                                          const OptionalTensor& norms, const OptionalTensor& squares, double scaling,
                                          double dropout_p, const OptionalTensor& rng) {
  static const auto op =
      binding::find_operator<ForwardResults(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                            const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                            double, double, const OptionalTensor&)>("pylora::dora_linear_forward");
  return op.call(x, weight, bias, a, b, magnitude, norms, squares, scaling, dropout_p, rng);
}

/// dx, dweight, dbias, da, db, dmagnitude; those not asked for are empty.
using BackwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardNeeds = std::array<bool, 6>;

inline BackwardResults call_linear_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight,
                                            const Tensor& a, const Tensor& b, const Tensor& magnitude,
                                            const Tensor& norms, const OptionalTensor& z, const OptionalTensor& v,
                                            double scaling, double dropout_p, const OptionalTensor& rng,
                                            BackwardNeeds needs) {
  static const auto op = binding::find_operator<BackwardResults(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const OptionalTensor&, const OptionalTensor&, double, double, const OptionalTensor&,
      BackwardNeeds)>("pylora::dora_linear_backward");
  return op.call(dy, x, weight, a, b, magnitude, norms, z, v, scaling, dropout_p, rng, needs);
}

namespace lora {

inline std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const Tensor& a,
                                                 const Tensor& b, double scaling) {
  static const auto op = binding::find_operator<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, double, double,
      const OptionalTensor&)>("pylora::lora_linear_forward");
  return op.call(x, weight, std::nullopt, a, b, scaling, 0.0, std::nullopt);
}

/// factor (x W^T + scaling v B^T) + bias; CPU alone.
inline Tensor linear_scaled(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                            const Tensor& b, const Tensor& factor, double scaling) {
  static const auto op =
      binding::find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                    const Tensor&, double)>("pylora::lora_linear_scaled");
  return op.call(x, weight, bias, a, b, factor, scaling);
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b, double scaling) {
  static const auto op =
      binding::find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                    double, double, const OptionalTensor&)>("pylora::lora_linear");
  return op.call(x, weight, std::nullopt, a, b, scaling, 0.0, std::nullopt);
}

inline std::tuple<Tensor, Tensor> add_forward(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b,
                                              double scaling) {
  static const auto op = binding::find_operator<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, const OptionalTensor&)>(
      "pylora::lora_add_forward");
  return op.call(base, x, a, b, scaling, 0.0, std::nullopt);
}

/// dx, dweight, dbias, da, db.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const OptionalTensor& x,
                                                                          const OptionalTensor& weight, const Tensor& a,
                                                                          const Tensor& b, const OptionalTensor& v,
                                                                          double scaling, std::array<bool, 5> needs) {
  static const auto op = binding::find_operator<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      double, double, const OptionalTensor&, std::array<bool, 5>)>("pylora::lora_linear_backward");
  return op.call(dy, x, weight, a, b, v, scaling, 0.0, std::nullopt, needs);
}

inline Tensor dropout(const Tensor& x, double dropout_p, const OptionalTensor& rng) {
  if (dropout_p == 0) return x;
  static const auto op =
      binding::find_operator<Tensor(const Tensor&, double, const OptionalTensor&)>("pylora::lora_dropout");
  return op.call(x, dropout_p, rng);
}

}  // namespace lora
}  // namespace pylora::dora
