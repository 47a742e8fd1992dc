// lora in ATen calls: the gradients as differentiable expressions (double backward), and the op on devices or
// dtypes without fused kernels. Sums are taken in the accumulator's type, as in lora.h; x is converted whole.
#pragma once

#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <array>
#include <tuple>

#include "binding/dtype.h"
#include "lora/call.h"

namespace pylora::lora::aten {

inline Tensor rows(const Tensor& t) { return t.reshape({-1, t.size(-1)}); }
inline Tensor widen(const Tensor& t) { return t.to(binding::accumulator_type(t.scalar_type())); }

/// drop(x) as rows of accumulators.
inline Tensor dropped_rows(const Tensor& x, double dropout_p, const OptionalTensor& rng) {
  const Tensor wide = widen(rows(x));
  return dropout_p > 0 ? call_dropout(wide, dropout_p, rng) : wide;
}

/// y = base + scaling * v b^T and v = drop(x) a^T.
inline std::tuple<Tensor, Tensor> forward(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b,
                                          double scaling, double dropout_p, const OptionalTensor& rng) {
  const Tensor x_rows = dropped_rows(x, dropout_p, rng);
  const Tensor v = at::mm(x_rows, a.t().to(x_rows.scalar_type()));
  const Tensor delta = at::mm(v, b.t().to(v.scalar_type())).mul(scaling);
  return {widen(base).add(delta.view(base.sizes())).to(base.scalar_type()), v};
}

struct Gradients {
  Tensor dx, da, db;
};

/// needs: {dx, da, db}; the others stay undefined.
inline Gradients backward(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b, double scaling,
                          double dropout_p, const OptionalTensor& rng, std::array<bool, 3> needs) {
  Gradients grads;
  const Tensor dy_rows = widen(rows(dy));
  const Tensor wide_a = a.to(dy_rows.scalar_type()), wide_b = b.to(dy_rows.scalar_type());
  const Tensor g = needs[0] || needs[1] ? at::mm(dy_rows, wide_b).mul(scaling) : Tensor();
  if (needs[0]) {
    const Tensor dx = at::mm(g, wide_a).view(x.sizes());
    grads.dx = dropout_p > 0 ? call_dropout(dx, dropout_p, rng) : dx;
  }
  if (needs[1] || needs[2]) {
    const Tensor x_rows = dropped_rows(x, dropout_p, rng);
    if (needs[1]) grads.da = at::mm(g.t(), x_rows).to(a.scalar_type());
    if (needs[2]) grads.db = at::mm(dy_rows.t(), at::mm(x_rows, wide_a.t())).mul(scaling).to(b.scalar_type());
  }
  return grads;
}

}  // namespace pylora::lora::aten
