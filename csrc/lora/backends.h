// The two implementations of a delta, behind one shape: Kernels (lora.h's launchers, CPU) and Aten (any other
// device).
//   forward:  adds scaling * drop(x) a^T b^T into y, which the caller owns, and returns {y, v}
//   backward: adds to dx, where given, and returns the gradients asked for
#pragma once

#include <ATen/ops/empty.h>

#include "binding/context.h"
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

inline ConstMatrix matrix(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
inline MutableMatrix mutable_matrix(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1)}; }

/// Tokens as rows, neighbouring columns side by side in memory: a copy only where the strides allow nothing
/// else.
inline Tensor token_rows(const Tensor& t) {
  const Tensor r = aten::rows(t);
  return r.stride(1) == 1 || r.size(1) <= 1 ? r : r.contiguous();
}

inline Shape shape_of(const Tensor& x_rows, const Tensor& a, const Tensor& b) {
  return {x_rows.size(0),
          x_rows.size(1),
          b.size(0),
          a.size(0),
          binding::to_dtype(x_rows.scalar_type()),
          binding::to_dtype(a.scalar_type())};
}

inline Tensor workspace_of(int64_t bytes, const Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

inline Dropout dropout_of(double dropout_p, const OptionalTensor& rng) {
  return dropout_p > 0 ? make_dropout(dropout_p, rng->const_data_ptr<int64_t>()) : Dropout{};
}

struct KernelBackend {
  static std::tuple<Tensor, Tensor> forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                            double scaling, double dropout_p, const OptionalTensor& rng) {
    const Tensor x_rows = token_rows(x);
    ForwardArgs args;
    args.shape = shape_of(x_rows, a, b);
    const Tensor v = at::empty({args.shape.num_tokens, args.shape.rank},
                               x.options().dtype(binding::accumulator_type(x.scalar_type())));
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

  static aten::Gradients backward(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b,
                                  const Tensor& v, double scaling, double dropout_p, const OptionalTensor& rng,
                                  DeltaNeeds needs) {
    const Tensor x_rows = token_rows(x), dy_rows = token_rows(dy);
    BackwardArgs args;
    args.shape = shape_of(x_rows, a, b);
    aten::Gradients grads;
    if (needs.dx) args.dx = {dx.mutable_data_ptr(), args.shape.in_features, 1}, grads.dx = dx;
    if (needs.da) grads.da = at::empty(a.sizes(), a.options()), args.da = grads.da.mutable_data_ptr();
    if (needs.db) grads.db = at::empty(b.sizes(), b.options()), args.db = grads.db.mutable_data_ptr();
    const Tensor workspace = workspace_of(backward_workspace_bytes(args.shape), x);
    args.scaling = scaling;
    args.dropout = dropout_of(dropout_p, rng);
    args.dy = matrix(dy_rows);
    args.x = matrix(x_rows);
    args.a = matrix(a);
    args.b = matrix(b);
    args.v = v.const_data_ptr();
    args.workspace = workspace.mutable_data_ptr();
    binding::throw_unless_ok(backward_cpu(binding::cpu_context(), args));
    return grads;
  }
};

struct AtenBackend {
  static std::tuple<Tensor, Tensor> forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                            double scaling, double dropout_p, const OptionalTensor& rng) {
    return aten::forward(y, x, a, b, scaling, dropout_p, rng);
  }

  static aten::Gradients backward(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b,
                                  const Tensor&, double scaling, double dropout_p, const OptionalTensor& rng,
                                  DeltaNeeds needs) {
    aten::Gradients grads = aten::backward(dy, x, a, b, scaling, dropout_p, rng, {needs.dx, needs.da, needs.db});
    if (needs.dx) grads.dx = (aten::widen(dx) + grads.dx.view(dx.sizes())).to(dx.scalar_type());
    return grads;
  }
};

}  // namespace pylora::lora
