// lora in ATen calls: the gradients as differentiable expressions (double backward), and the op on devices or dtypes
// without fused kernels. Sums are taken in the accumulator's type, as in lora.h; x is converted whole.
#pragma once

#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <array>
#include <tuple>
#include <vector>

#include "binding/dtype.h"
#include "lora/call.h"

namespace pylora::lora::aten {

/// Inside the ops, dtypes are settled: autocast would change those of single products under the op's feet.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

/// Leading dimensions flattened; counted, since -1 is ambiguous for a width of 0.
inline Tensor rows(const Tensor& t) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    count *= t.size(i);
  return t.reshape({count, t.size(-1)});
}

/// t's leading dimensions with another last one.
inline std::vector<int64_t> with_width(const Tensor& t, int64_t width) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = width;
  return shape;
}

inline Tensor widen(const Tensor& t) { return t.to(binding::accumulator_type(t.scalar_type())); }

/// x w^T + bias, contiguous.
inline Tensor dense(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  return at::linear(x, w, bias).contiguous();
}

/// Gradients of y = x weight^T + bias; those not asked for stay undefined. needs: {dx, dweight, dbias}.
struct BaseGradients {
  Tensor dx, dweight, dbias;
};
using Dense = Tensor (*)(const Tensor&, const Tensor&, const OptionalTensor&);

inline BaseGradients base_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight,
                                   std::array<bool, 3> needs, Dense product) {
  const Tensor dy_rows = rows(dy);
  BaseGradients grads;
  if (needs[0]) grads.dx = product(dy_rows, weight->t(), std::nullopt).view(with_width(dy, weight->size(1)));
  if (needs[1]) grads.dweight = at::mm(dy_rows.t(), rows(*x));
  if (needs[2]) grads.dbias = at::sum(dy_rows, 0);
  return grads;
}

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

/// needs: {dx, da, db}; the others stay undefined. x is read for da, and for db where v is absent. Without v the
/// result is differentiable in dy, x, a and b.
inline Gradients backward(const Tensor& dy, const OptionalTensor& x, const Tensor& a, const Tensor& b,
                          const OptionalTensor& v, double scaling, double dropout_p, const OptionalTensor& rng,
                          std::array<bool, 3> needs) {
  Gradients grads;
  const Tensor dy_rows = widen(rows(dy));
  const Tensor wide_a = a.to(dy_rows.scalar_type()), wide_b = b.to(dy_rows.scalar_type());
  const Tensor g = needs[0] || needs[1] ? at::mm(dy_rows, wide_b).mul(scaling) : Tensor();
  if (needs[0]) {
    const Tensor dx = at::mm(g, wide_a).view(with_width(dy, a.size(1)));
    grads.dx = dropout_p > 0 ? call_dropout(dx, dropout_p, rng) : dx;
  }
  const Tensor x_rows = needs[1] || (needs[2] && !v) ? dropped_rows(*x, dropout_p, rng) : Tensor();
  if (needs[1]) grads.da = at::mm(g.t(), x_rows).to(a.scalar_type());
  if (needs[2]) {
    const Tensor shrunk = v ? *v : at::mm(x_rows, wide_a.t());
    grads.db = at::mm(dy_rows.t(), shrunk).mul(scaling).to(b.scalar_type());
  }
  return grads;
}

}  // namespace pylora::lora::aten
