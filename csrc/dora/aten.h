// dora in ATen calls: the gradients as differentiable expressions (double backward), and what devices without fused
// kernels run. Sums are taken in the accumulator's type, as in dora.h.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <vector>

#include "binding/tensors.h"
#include "dora/call.h"
#include "dora/dora.h"

namespace pylora::dora::aten {

/// Rows of W worked on at a time hold about this many elements, so that nothing of W's size is made.
constexpr int64_t kBlockElements = 1 << 22;

inline int64_t block_rows(const Tensor& weight) {
  return std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, weight.size(1)));
}

inline Tensor row_squares(const Tensor& weight) {
  const Tensor squares = at::empty({weight.size(0)}, weight.options().dtype(at::kDouble));
  const int64_t step = block_rows(weight);
  for (int64_t row = 0; row < weight.size(0); row += step) {
    const int64_t count = std::min(step, weight.size(0) - row);
    squares.narrow(0, row, count).copy_(binding::as_accumulators(weight.narrow(0, row, count)).square().sum(1));
  }
  return squares;
}

/// a, b and gram = a a^T in f64.
inline Tensor block_norms(const Tensor& weight, const Tensor& a, const Tensor& b, const Tensor& gram, double scaling) {
  const Tensor wide = binding::as_accumulators(weight);
  const Tensor own = wide.square().sum(1).to(at::kDouble);
  const Tensor cross = at::mm(wide, a.to(wide.scalar_type()).t()).to(at::kDouble).mul(b).sum(1);
  const Tensor quad = at::mm(b, gram).mul(b).sum(1);
  const Tensor norms = own.add(cross, 2 * scaling).add(quad, scaling * scaling);
  const Tensor cancelled = norms.gt(own.mul(kCancelled)).logical_not().nonzero().view(-1);
  if (cancelled.size(0) > 0) {
    const Tensor delta = at::mm(b.index_select(0, cancelled), a).mul(scaling);
    const Tensor rows = weight.index_select(0, cancelled).to(at::kDouble).add(delta);
    norms.index_copy_(0, cancelled, rows.square().sum(1));
  }
  return norms.sqrt();
}

inline Tensor row_norms(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling) {
  const Tensor wide_a = a.to(at::kDouble), wide_b = b.to(at::kDouble), gram = at::mm(wide_a, wide_a.t());
  const Tensor norms = at::empty({weight.size(0)}, weight.options().dtype(at::kDouble));
  const int64_t step = block_rows(weight);
  for (int64_t row = 0; row < weight.size(0); row += step) {
    const int64_t count = std::min(step, weight.size(0) - row);
    norms.narrow(0, row, count)
        .copy_(block_norms(weight.narrow(0, row, count), wide_a, wide_b.narrow(0, row, count), gram, scaling));
  }
  return norms;
}

/// The norms as divisors of the accumulator's type: rounded to magnitude's dtype, 1 where they are 0.
inline Tensor divisors(const Tensor& norms, const Tensor& magnitude, at::ScalarType accumulator) {
  const Tensor rounded = norms.to(magnitude.scalar_type()).to(accumulator);
  return at::where(rounded.eq(0), at::ones_like(rounded), rounded);
}

/// y = magnitude / norms * z + rest + bias.
inline Tensor scale(const Tensor& z, const OptionalTensor& rest, const Tensor& magnitude, const Tensor& norms,
                    const OptionalTensor& bias) {
  Tensor y = binding::as_accumulators(z);
  y = y.mul(magnitude.to(y.scalar_type()).div(divisors(norms, magnitude, y.scalar_type())));
  if (rest) y = y.add(*rest);
  if (bias) y = y.add(*bias);
  return y.to(z.scalar_type());
}

/// dz in dy's dtype, and dmagnitude in the accumulator's; those not asked for (z, need_dz) stay undefined.
inline std::tuple<Tensor, Tensor> scale_backward(const Tensor& dy, const OptionalTensor& z, const Tensor& magnitude,
                                                 const Tensor& norms, bool need_dz) {
  const Tensor wide = binding::as_accumulators(dy);
  const Tensor divisor = divisors(norms, magnitude, wide.scalar_type());
  Tensor dz, dmagnitude;
  if (need_dz) dz = wide.mul(magnitude.to(wide.scalar_type()).div(divisor)).to(dy.scalar_type());
  if (z) dmagnitude = wide.mul(*z).sum(0).div(divisor);
  return {dz, dmagnitude};
}

/// The gradients, differentiable in dy, x, weight, a, b and magnitude; those not asked for stay undefined.
inline BackwardResults differentiable_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight,
                                               const Tensor& a, const Tensor& b, const Tensor& magnitude,
                                               const Tensor& norms, double scaling, double dropout_p,
                                               const OptionalTensor& rng, BackwardNeeds needs) {
  const auto [need_x, need_weight, need_bias, need_a, need_b, need_magnitude] = needs;
  const Tensor dy_rows = binding::as_accumulators(binding::flat_rows(dy));
  const at::ScalarType type = dy_rows.scalar_type();
  const Tensor divisor = divisors(norms, magnitude, type), wide_a = a.to(type), wide_b = b.to(type);
  const Tensor dz = dy_rows.mul(magnitude.to(type).div(divisor));
  const Tensor wide_weight = weight ? weight->to(type) : Tensor();
  Tensor dx, dweight, dbias, da, db, dmagnitude, x_rows, dropped;
  if (x) {
    x_rows = binding::as_accumulators(binding::flat_rows(*x));
    dropped = lora::dropout(x_rows, dropout_p, rng);
  }
  const Tensor g = need_x || need_a ? at::mm(dz, wide_b).mul(scaling) : Tensor();
  if (need_x) {
    dx =
        lora::dropout(at::mm(dropout_p > 0 ? dz.sub(dy_rows) : dz, wide_weight).add(at::mm(g, wide_a)), dropout_p, rng);
    if (dropout_p > 0) dx = dx.add(at::mm(dy_rows, wide_weight));
    dx = dx.view(binding::shape_with_width(dy, a.size(1))).to(dy.scalar_type());
  }
  if (need_weight) {
    dweight = at::mm(dz.t(), dropped);
    if (dropout_p > 0) dweight = dweight.add(at::mm(dy_rows.t(), x_rows.sub(dropped)));
    dweight = dweight.to(dy.scalar_type());
  }
  if (need_bias) dbias = dy_rows.sum(0).to(dy.scalar_type());
  if (need_a) da = at::mm(g.t(), dropped).to(a.scalar_type());
  if (need_b || need_magnitude) {
    const Tensor v = at::mm(dropped, wide_a.t());
    if (need_b) db = at::mm(dz.t(), v).mul(scaling).to(b.scalar_type());
    if (need_magnitude) {
      const Tensor z = at::mm(dropped, wide_weight.t()).add(at::mm(v, wide_b.t()), scaling);
      dmagnitude = dy_rows.mul(z).sum(0).div(divisor).to(magnitude.scalar_type());
    }
  }
  return {dx, dweight, dbias, da, db, dmagnitude};
}

}  // namespace pylora::dora::aten
