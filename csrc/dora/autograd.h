// Derivatives of dora_linear, in one C++ function. The norms are constants, as in the paper.
//
// Saved for backward: x (which the caller holds), v [num_tokens, rank], z [num_tokens, out_features], the norms and the
// generator's state; no dropped copy of x and no mask. Where a graph of the backward itself is wanted (create_graph),
// the gradients are built from differentiable ATen calls, so that double backward works.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "dora/aten.h"

namespace pylora::dora {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool wants_grad(const Tensor& t) { return t.requires_grad(); }
inline bool wants_grad(const OptionalTensor& t) { return t && t->requires_grad(); }
inline bool has_tangent(const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const OptionalTensor& t) { return t && has_tangent(*t); }

template <class... Tensors>
bool records_graph(const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(tensors) || ...), "dora: no forward-mode derivative (jvp)");
  return at::GradMode::is_enabled() && (wants_grad(tensors) || ...);
}

inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
inline Tensor if_needed(bool needed, const Tensor& t) { return needed ? t : Tensor(); }

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  // The optional tensors come last among the tensors: an absent one takes no edge, and shifts those after it.
  enum Edge { kX, kWeight, kA, kB, kMagnitude, kBias };

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& a,
                               const Tensor& b, const Tensor& magnitude, const OptionalTensor& bias,
                               const OptionalTensor& norms, const OptionalTensor& squares, const OptionalTensor& rng,
                               double scaling, double dropout_p) {
    const bool factors = a.requires_grad() || b.requires_grad(), magnitudes = magnitude.requires_grad();
    // Under create_graph z and v are computed again, from x and the weight.
    const bool reads_x = factors || magnitudes || weight.requires_grad();
    const bool reads_weight = x.requires_grad() || magnitudes;
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, z, v, new_norms] =
        call_linear_forward(x, weight, bias, a, b, magnitude, norms, squares, scaling, dropout_p, rng);
    ctx->save_for_backward({if_needed(reads_x, x), if_needed(reads_weight, weight), a, b, magnitude,
                            norms ? *norms : new_norms, if_needed(magnitudes, z), if_needed(b.requires_grad(), v),
                            rng.value_or(Tensor())});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->mark_non_differentiable({new_norms});
    return {y, new_norms};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor x = optional(saved[0]), weight = optional(saved[1]), rng = optional(saved[8]);
    const Tensor &a = saved[2], &b = saved[3], &magnitude = saved[4], &norms = saved[5], &dy = grad_outputs[0];
    const double scaling = ctx->saved_data["scaling"].toDouble(), dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const bool need_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(kBias);
    const BackwardNeeds needs{
        ctx->needs_input_grad(kX), ctx->needs_input_grad(kWeight), need_bias,
        ctx->needs_input_grad(kA), ctx->needs_input_grad(kB),      ctx->needs_input_grad(kMagnitude)};
    const binding::NoAutocast settled;
    const auto [dx, dweight, dbias, da, db, dmagnitude] =
        at::GradMode::is_enabled()
            ? aten::differentiable_backward(dy, x, weight, a, b, magnitude, norms, scaling, dropout_p, rng, needs)
            : call_linear_backward(dy, x, weight, a, b, magnitude, norms, optional(saved[6]), optional(saved[7]),
                                   scaling, dropout_p, rng, needs);
    return {if_needed(needs[0], dx),
            if_needed(needs[1], dweight),
            if_needed(needs[3], da),
            if_needed(needs[4], db),
            if_needed(needs[5], dmagnitude),
            if_needed(needs[2], dbias),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

inline Tensor linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                              const Tensor& b, const Tensor& magnitude, const Tensor& norms, double scaling,
                              double dropout_p, const OptionalTensor& rng) {
  if (records_graph(x, weight, bias, a, b, magnitude)) {
    return LinearFunction::apply(x, weight, a, b, magnitude, bias, OptionalTensor(norms), OptionalTensor(), rng,
                                 scaling, dropout_p)[0];
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(x, weight, bias, a, b, magnitude, norms, scaling, dropout_p, rng);
}

inline std::tuple<Tensor, Tensor> linear_norms_autograd(const Tensor& x, const Tensor& weight,
                                                        const OptionalTensor& bias, const Tensor& a, const Tensor& b,
                                                        const Tensor& magnitude, const OptionalTensor& squares,
                                                        double scaling, double dropout_p, const OptionalTensor& rng) {
  if (records_graph(x, weight, bias, a, b, magnitude)) {
    const variable_list results =
        LinearFunction::apply(x, weight, a, b, magnitude, bias, OptionalTensor(), squares, rng, scaling, dropout_p);
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear_norms(x, weight, bias, a, b, magnitude, squares, scaling, dropout_p, rng);
}

// The norms are constants: no gradient flows through them.
inline Tensor row_squares_autograd(const Tensor& weight) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_row_squares(weight);
}

inline Tensor row_norms_autograd(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_row_norms(weight, a, b, scaling);
}

}  // namespace pylora::dora
