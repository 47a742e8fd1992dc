// The two implementations of a delta, behind one shape: Kernels (lora.h's launchers, CPU) and Aten (any other
// device).
//   dense:    the base product
//   linear:   base product and delta in one, returns {y, v}
//   forward:  adds scaling * drop(x) a^T b^T into y, which the caller owns, and returns {y, v}
//   backward: adds to dx, where given, and returns the gradients asked for
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include "binding/context.h"
#include "binding/dense.h"
#include "binding/status.h"
#include "lora/aten.h"
#include "lora/heuristics.h"
#include "lora/lora.h"

namespace pylora::lora {

/// Needs of a backward pass of the delta.
struct DeltaNeeds {
  bool dx, da, db;
  bool any() const { return dx || da || db; }
};

using binding::matrix;
using binding::workspace_of;

/// Tokens as rows, as kernels take them.
inline Tensor token_rows(const Tensor& t) { return binding::with_unit_columns(aten::rows(t)); }

inline Shape shape_of(int64_t num_tokens, at::ScalarType dtype, const Tensor& a, const Tensor& b) {
  return {num_tokens, a.size(1), b.size(0), a.size(0), binding::to_dtype(dtype), binding::to_dtype(a.scalar_type())};
}

inline Dropout dropout_of(double dropout_p, const OptionalTensor& rng) {
  return dropout_p > 0 ? make_dropout(dropout_p, rng->const_data_ptr<int64_t>()) : Dropout{};
}

struct KernelBackend {
  /// Whether torch multiplies these dtypes as fast as the CPU can: then its products serve wherever nothing has to be
  /// fused with them, at rank 16 and 512 rows at 0.9 of the time of the kernels here, at rank 256 at 0.6.
  static bool torch_products_are_good(const Tensor& x, const Tensor& a) {
    const at::ScalarType dtype = x.scalar_type();
    return (dtype == at::kFloat || dtype == at::kDouble) && a.scalar_type() == dtype;
  }

  /// The base product: x [rows, in], weight [out, in].
  static Tensor dense(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    return binding::dense_product(x, weight, bias);
  }

  static std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                           const Tensor& a, const Tensor& b, double scaling, double dropout_p,
                                           const OptionalTensor& rng) {
    const binding::TokenRows x_rows(x);
    GemmArgs product = binding::product_args(x_rows, weight);
    if (!binding::takes_adapter(product, b)) {
      const Tensor base = dense(aten::rows(x), weight, bias).view(aten::with_width(x, weight.size(0)));
      return forward(base, x, a, b, scaling, dropout_p, rng);
    }
    return one_product(x_rows, product, x, bias, a, b, scaling, dropout_p, rng);
  }

  /// factor (x w^T + scaling v b^T) + bias, rounded once where one product makes it all.
  static Tensor scaled_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                              const Tensor& b, const Tensor& factor, double scaling) {
    const binding::TokenRows x_rows(x);
    GemmArgs product = binding::product_args(x_rows, weight);
    if (!binding::takes_adapter(product, b)) {
      const Tensor y = aten::widen(std::get<0>(linear(x, weight, std::nullopt, a, b, scaling, 0.0, std::nullopt)));
      y.mul_(factor);
      if (bias) y.add_(*bias);
      return y.to(x.scalar_type());
    }
    product.factor = factor.const_data_ptr<float>();
    return std::get<0>(one_product(x_rows, product, x, bias, a, b, scaling, 0.0, std::nullopt));
  }

  static std::tuple<Tensor, Tensor> one_product(const binding::TokenRows& x_rows, GemmArgs product, const Tensor& x,
                                                const OptionalTensor& bias, const Tensor& a, const Tensor& b,
                                                double scaling, double dropout_p, const OptionalTensor& rng) {
    const Tensor v = shrink(x_rows, a, b, dropout_p, rng);
    product.low_rank = {a.size(0), static_cast<float>(scaling), v.const_data_ptr<float>(), matrix(b),
                        binding::to_dtype(b.scalar_type())};
    return {binding::run_product(product, bias, x), v};
  }

  /// v = drop(x) a^T.
  static Tensor shrink(const binding::TokenRows& x, const Tensor& a, const Tensor& b, double dropout_p,
                       const OptionalTensor& rng) {
    ShrinkArgs args;
    args.shape = shape_of(x.count, x.held.scalar_type(), a, b);
    args.dropout = dropout_of(dropout_p, rng);
    args.x = x.matrix;
    args.a = matrix(a);
    const Tensor v = new_v(x.held, args.shape);
    const binding::CpuWorkspace workspace(shrink_workspace_bytes(args));
    args.v = v.mutable_data_ptr();
    args.workspace = workspace.data();
    binding::throw_unless_ok(shrink_cpu(binding::cpu_context(), args));
    return v;
  }

  static Tensor new_v(const Tensor& x, const Shape& shape) {
    return binding::new_on_cpu({shape.num_tokens, shape.rank}, binding::accumulator_type(x.scalar_type()));
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                            double scaling, double dropout_p, const OptionalTensor& rng) {
    const Tensor x_rows = token_rows(x);
    if (torch_products_are_good(x, a) && x_rows.size(0) > kOwnRows) {
      const Tensor v = dropout_p > 0 ? shrink(binding::TokenRows(x_rows), a, b, dropout_p, rng) : at::mm(x_rows, a.t());
      Tensor y_rows = y.view({x_rows.size(0), b.size(0)});
      y_rows.addmm_(v, b.t(), 1, scaling);
      return {y, v};
    }
    ForwardArgs args;
    args.shape = shape_of(x_rows.size(0), x.scalar_type(), a, b);
    const Tensor v = new_v(x, args.shape);
    const Tensor workspace = workspace_of(forward_workspace_bytes(args.shape), x);
    args.scaling = scaling;
    args.dropout = dropout_of(dropout_p, rng);
    args.x = matrix(x_rows);
    args.a = matrix(a);
    args.b = matrix(b);
    args.y = {y.mutable_data_ptr(), args.shape.out_features, 1};
    args.v = v.mutable_data_ptr();
    args.workspace = workspace.mutable_data_ptr();
    binding::throw_unless_ok(forward_cpu(binding::cpu_context(), args));
    return {y, v};
  }

  static aten::Gradients backward(const Tensor& dx, const Tensor& dy, const OptionalTensor& x, const Tensor& a,
                                  const Tensor& b, const OptionalTensor& v, double scaling, double dropout_p,
                                  const OptionalTensor& rng, DeltaNeeds needs) {
    const Tensor dy_rows = token_rows(dy), x_rows = needs.da ? token_rows(*x) : Tensor();
    BackwardArgs args;
    args.shape = shape_of(dy_rows.size(0), dy.scalar_type(), a, b);
    aten::Gradients grads;
    Tensor g;
    if (torch_products_are_good(dy, a)) {
      if (needs.dx || needs.da) g = at::mm(dy_rows, b).mul_(scaling);
      if (needs.db) grads.db = at::mm(dy_rows.t(), v->mul(scaling));
      if (dropout_p == 0.0) {
        if (needs.dx) {
          grads.dx = dx;
          dx.view({dy_rows.size(0), a.size(1)}).addmm_(g, a);
        }
        if (needs.da) grads.da = at::mm(g.t(), x_rows);
        return grads;
      }
      needs.db = false;
      if (!needs.any()) return grads;
      args.g = g.const_data_ptr();
    }
    if (needs.dx) {
      TORCH_INTERNAL_ASSERT(dx.scalar_type() == dy.scalar_type() && dx.is_contiguous());
      grads.dx = dx;
      args.dx = {dx.mutable_data_ptr(), args.shape.in_features, 1};
    }
    if (needs.da) {
      grads.da = at::empty(a.sizes(), a.options());
      args.da = grads.da.mutable_data_ptr();
      args.x = matrix(x_rows);
    }
    if (needs.db) {
      grads.db = at::empty(b.sizes(), b.options());
      args.db = grads.db.mutable_data_ptr();
      args.v = v->const_data_ptr();
    }
    const Tensor workspace = workspace_of(backward_workspace_bytes(args.shape), dy);
    args.scaling = scaling;
    args.dropout = dropout_of(dropout_p, rng);
    args.dy = matrix(dy_rows);
    args.a = matrix(a);
    args.b = matrix(b);
    args.workspace = workspace.mutable_data_ptr();
    binding::throw_unless_ok(backward_cpu(binding::cpu_context(), args));
    return grads;
  }
};

struct AtenBackend {
  static Tensor dense(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    return aten::dense(x, weight, bias);
  }

  static std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                           const Tensor& a, const Tensor& b, double scaling, double dropout_p,
                                           const OptionalTensor& rng) {
    const Tensor base = dense(aten::rows(x), weight, bias).view(aten::with_width(x, weight.size(0)));
    return forward(base, x, a, b, scaling, dropout_p, rng);
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                            double scaling, double dropout_p, const OptionalTensor& rng) {
    return aten::forward(y, x, a, b, scaling, dropout_p, rng);
  }

  static aten::Gradients backward(const Tensor& dx, const Tensor& dy, const OptionalTensor& x, const Tensor& a,
                                  const Tensor& b, const OptionalTensor& v, double scaling, double dropout_p,
                                  const OptionalTensor& rng, DeltaNeeds needs) {
    aten::Gradients grads = aten::backward(dy, x, a, b, v, scaling, dropout_p, rng, {needs.dx, needs.da, needs.db});
    if (needs.dx) grads.dx = aten::widen(dx).add(grads.dx).to(dx.scalar_type());
    return grads;
  }
};

}  // namespace pylora::lora
