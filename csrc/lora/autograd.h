// Derivatives of the lora ops, in C++: a Python autograd.Function costs 10 to 23 us a call, this 5.
//
// Saved for backward: x (which the caller holds), v [num_tokens, rank] and the generator's state; no dropped copy and
// no mask. Where a graph of the backward itself is wanted (create_graph), the gradients are built from differentiable
// ATen calls instead of the fused kernels, so that double backward works.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "lora/aten.h"

namespace pylora::lora {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool wants_grad(const Tensor& t) { return t.requires_grad(); }
inline bool wants_grad(const OptionalTensor& t) { return t && t->requires_grad(); }
inline bool has_tangent(const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const OptionalTensor& t) { return t && has_tangent(*t); }

template <class... Tensors>
bool records_graph(const Tensors&... tensors) {
  // torch says so itself only where the call also records a graph; elsewhere the tangent would be lost in silence.
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(tensors) || ...), "lora: no forward-mode derivative (jvp)");
  return at::GradMode::is_enabled() && (wants_grad(tensors) || ...);
}

/// A gradient that was not asked for comes out of an op as an empty tensor, and goes back to autograd undefined.
inline Tensor if_needed(bool needed, const Tensor& grad) { return needed ? grad : Tensor(); }

inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

/// `t` if a backward will read it, else nothing to keep.
inline Tensor if_read(bool read, const Tensor& t) { return read ? t : Tensor(); }

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  // The optional bias and rng come last among the tensors: an absent one takes no edge, and shifts those after it.
  enum Edge { kX, kWeight, kA, kB, kBias };

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b,
                        const OptionalTensor& bias, const OptionalTensor& rng, double scaling, double dropout_p) {
    static const auto op =
        find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                           const Tensor&, double, double, const OptionalTensor&)>(
            "pylora::lora_linear_forward");
    const bool factors = a.requires_grad() || b.requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, v] = op.call(x, weight, bias, a, b, scaling, dropout_p, rng);
    ctx->save_for_backward({if_read(factors || weight.requires_grad(), x), if_read(x.requires_grad(), weight), a, b,
                            if_read(b.requires_grad(), v), rng.value_or(Tensor())});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor x = optional(saved[0]), weight = optional(saved[1]), v = optional(saved[4]);
    const OptionalTensor rng = optional(saved[5]);
    const Tensor &a = saved[2], &b = saved[3], &dy = grad_outputs[0];
    const double scaling = ctx->saved_data["scaling"].toDouble(), dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const bool need_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(kBias);
    const bool need_x = ctx->needs_input_grad(kX), need_weight = ctx->needs_input_grad(kWeight);
    const bool need_a = ctx->needs_input_grad(kA), need_b = ctx->needs_input_grad(kB);
    if (at::GradMode::is_enabled()) {
      const aten::NoAutocast settled;
      const aten::Gradients grads =
          aten::backward(dy, x, a, b, std::nullopt, scaling, dropout_p, rng, {need_x, need_a, need_b});
      aten::BaseGradients base = aten::base_backward(dy, x, weight, {need_x, need_weight, need_bias}, aten::dense);
      if (need_x) base.dx = aten::widen(base.dx).add(grads.dx).to(dy.scalar_type());
      return {base.dx, base.dweight, grads.da, grads.db, base.dbias, Tensor(), Tensor(), Tensor()};
    }
    static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
        const OptionalTensor&, double, double, const OptionalTensor&, std::array<bool, 5>)>(
        "pylora::lora_linear_backward");
    const auto [dx, dweight, dbias, da, db] =
        op.call(dy, x, weight, a, b, v, scaling, dropout_p, rng, {need_x, need_weight, need_bias, need_a, need_b});
    return {if_needed(need_x, dx),
            if_needed(need_weight, dweight),
            if_needed(need_a, da),
            if_needed(need_b, db),
            if_needed(need_bias, dbias),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

struct AddFunction : torch::autograd::Function<AddFunction> {
  enum Edge { kBase, kX, kA, kB };

  static Tensor forward(AutogradContext* ctx, const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b,
                        const OptionalTensor& rng, double scaling, double dropout_p) {
    static const auto op =
        find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double,
                                           const OptionalTensor&)>("pylora::lora_add_forward");
    const bool factors = a.requires_grad() || b.requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, v] = op.call(base, x, a, b, scaling, dropout_p, rng);
    ctx->save_for_backward({if_read(factors, x), a, b, if_read(b.requires_grad(), v), rng.value_or(Tensor())});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor x = optional(saved[0]), v = optional(saved[3]), rng = optional(saved[4]);
    const Tensor &a = saved[1], &b = saved[2], &dy = grad_outputs[0];
    const double scaling = ctx->saved_data["scaling"].toDouble(), dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const bool need_x = ctx->needs_input_grad(kX), need_a = ctx->needs_input_grad(kA),
               need_b = ctx->needs_input_grad(kB);
    const Tensor dbase = if_needed(ctx->needs_input_grad(kBase), dy);
    if (!(need_x || need_a || need_b)) return {dbase, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    if (at::GradMode::is_enabled()) {
      const aten::NoAutocast settled;
      const aten::Gradients grads =
          aten::backward(dy, x, a, b, std::nullopt, scaling, dropout_p, rng, {need_x, need_a, need_b});
      const Tensor dx = need_x ? grads.dx.to(dy.scalar_type()) : Tensor();
      return {dbase, dx, grads.da, grads.db, Tensor(), Tensor(), Tensor()};
    }
    static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, double,
        const OptionalTensor&, std::array<bool, 3>)>("pylora::lora_add_backward");
    const auto [dx, da, db] = op.call(dy, x, a, b, v, scaling, dropout_p, rng, {need_x, need_a, need_b});
    return {dbase, if_needed(need_x, dx), if_needed(need_a, da), if_needed(need_b, db), Tensor(), Tensor(), Tensor()};
  }
};

struct DropoutFunction : torch::autograd::Function<DropoutFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double dropout_p, const OptionalTensor& rng) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({rng.value_or(Tensor())});
    ctx->saved_data["dropout_p"] = dropout_p;
    return call_dropout(x, dropout_p, rng);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const OptionalTensor rng = optional(ctx->get_saved_variables()[0]);
    return {call_dropout(grad_outputs[0], ctx->saved_data["dropout_p"].toDouble(), rng), Tensor(), Tensor()};
  }
};

inline Tensor linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                              const Tensor& b, double scaling, double dropout_p, const OptionalTensor& rng) {
  if (records_graph(x, weight, bias, a, b)) {
    return LinearFunction::apply(x, weight, a, b, bias, rng, scaling, dropout_p);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(x, weight, bias, a, b, scaling, dropout_p, rng);
}

inline Tensor add_autograd(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b, double scaling,
                           double dropout_p, const OptionalTensor& rng) {
  if (records_graph(base, x, a, b)) return AddFunction::apply(base, x, a, b, rng, scaling, dropout_p);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_add(base, x, a, b, scaling, dropout_p, rng);
}

inline Tensor dropout_autograd(const Tensor& x, double dropout_p, const OptionalTensor& rng) {
  if (records_graph(x)) return DropoutFunction::apply(x, dropout_p, rng);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_dropout(x, dropout_p, rng);
}

}  // namespace pylora::lora
