// pylora::dora_row_squares, dora_row_norms, dora_linear and dora_linear_norms: schemas, checks, registration.
// autograd.h has the derivatives.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "dora/autograd.h"
#include "dora/backends.h"
#include "dora/checks.h"

namespace pylora::dora {
namespace {

template <class Backend>
Tensor row_squares(const Tensor& weight) {
  DoraChecks("dora_row_squares").matrix("weight", weight);
  const binding::NoAutocast settled;
  return Backend::row_squares(weight);
}

template <class Backend>
Tensor row_norms(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling) {
  DoraChecks("dora_row_norms").norms(weight, a, b);
  const binding::NoAutocast settled;
  return Backend::row_norms(weight, a, b, scaling);
}

/// What the layer computes before the factor.
struct Products {
  Tensor z;             // drop(x) W^T + scaling * v B^T, rows
  OptionalTensor rest;  // (x - drop(x)) W^T with dropout
  Tensor v, norms;      // undefined where they were given or not asked for
};

/// One product for x, what dropout took away and A: W is read and packed once, and A W^T, which the norms need, comes
/// at the price of `rank` tokens.
template <class Backend>
Products stacked_products(const Tensor& x, const Tensor& dropped, bool drops, const Tensor& weight, const Tensor& a,
                          const Tensor& b, const OptionalTensor& squares, double scaling) {
  const int64_t rows = x.size(0);
  std::vector<Tensor> parts{dropped};
  if (drops) parts.push_back(x.sub(dropped));
  parts.push_back(a.to(x.scalar_type()));
  const Tensor product = Backend::dense(at::cat(parts, 0), weight);
  Products products;
  const Tensor cross = product.narrow(0, product.size(0) - a.size(0), a.size(0));
  products.norms =
      Backend::row_norms_from(cross, squares ? *squares : Backend::row_squares(weight), weight, a, b, scaling);
  if (drops) products.rest = product.narrow(0, rows, rows);
  std::tie(products.z, products.v) = lora::add_forward(product.narrow(0, 0, rows), dropped, a, b, scaling);
  return products;
}

template <class Backend>
Products products_of(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b, bool has_norms,
                     const OptionalTensor& squares, double scaling, double dropout_p, const OptionalTensor& rng) {
  const bool drops = dropout_p > 0;
  const Tensor dropped = lora::dropout(x, dropout_p, rng);
  if (!has_norms && Backend::stacks(x, a)) {
    return stacked_products<Backend>(x, dropped, drops, weight, a, b, squares, scaling);
  }
  Products products;
  std::tie(products.z, products.v) = lora::linear_forward(dropped, weight, a, b, scaling);
  if (drops) products.rest = Backend::dense(x.sub(dropped), weight);
  if (!has_norms) products.norms = Backend::row_norms(weight, a, b, scaling);
  return products;
}

template <class Backend>
ForwardResults linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                              const Tensor& b, const Tensor& magnitude, const OptionalTensor& norms,
                              const OptionalTensor& squares, double scaling, double dropout_p,
                              const OptionalTensor& rng) {
  DoraChecks("dora_linear").linear(x, weight, bias, a, b, magnitude, norms, squares, dropout_p, rng);
  const binding::NoAutocast settled;
  const Tensor rows = binding::flat_rows(x);
  const Products products =
      products_of<Backend>(rows, weight, a, b, norms.has_value(), squares, scaling, dropout_p, rng);
  const Tensor used = norms ? *norms : products.norms;
  const Tensor y = Backend::scale(products.z, products.rest, magnitude, used, bias, false);
  const Tensor new_norms = norms ? at::empty({0}, norms->options()) : products.norms;
  return {binding::unflattened(y, x), products.z, products.v, new_norms};
}

/// Without a backward z need not stay: the factor goes onto the sums, or onto z where it lies.
template <class Backend>
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a, const Tensor& b,
              const Tensor& magnitude, const Tensor& norms, double scaling, double dropout_p,
              const OptionalTensor& rng) {
  DoraChecks("dora_linear").linear(x, weight, bias, a, b, magnitude, norms, std::nullopt, dropout_p, rng);
  const binding::NoAutocast settled;
  if (dropout_p == 0) {
    if (const OptionalTensor y = Backend::one_product(x, weight, bias, a, b, magnitude, norms, scaling)) return *y;
  }
  const Tensor rows = binding::flat_rows(x), dropped = lora::dropout(rows, dropout_p, rng);
  const Tensor z = lora::linear(dropped, weight, a, b, scaling);
  const OptionalTensor rest = dropout_p > 0 ? OptionalTensor(Backend::dense(rows.sub(dropped), weight)) : std::nullopt;
  return binding::unflattened(Backend::scale(z, rest, magnitude, norms, bias, true), x);
}

template <class Backend>
std::tuple<Tensor, Tensor> linear_norms(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                        const Tensor& a, const Tensor& b, const Tensor& magnitude,
                                        const OptionalTensor& squares, double scaling, double dropout_p,
                                        const OptionalTensor& rng) {
  DoraChecks("dora_linear_norms").linear(x, weight, bias, a, b, magnitude, std::nullopt, squares, dropout_p, rng);
  const binding::NoAutocast settled;
  const Products products =
      products_of<Backend>(binding::flat_rows(x), weight, a, b, false, squares, scaling, dropout_p, rng);
  const Tensor y = Backend::scale(products.z, products.rest, magnitude, products.norms, bias, true);
  return {binding::unflattened(y, x), products.norms};
}

Tensor or_empty(const Tensor& grad, const Tensor& like) {
  return grad.defined() ? grad : at::empty({0}, like.options());
}

template <class Backend>
BackwardResults linear_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight,
                                const Tensor& a, const Tensor& b, const Tensor& magnitude, const Tensor& norms,
                                const OptionalTensor& z, const OptionalTensor& v, double scaling, double dropout_p,
                                const OptionalTensor& rng, BackwardNeeds needs) {
  DoraChecks("dora_linear_backward")
      .linear_backward(dy, x, weight, a, b, magnitude, norms, z, v, dropout_p, rng, needs);
  const auto [need_x, need_weight, need_bias, need_a, need_b, need_magnitude] = needs;
  const binding::NoAutocast settled;
  const Tensor dy_rows = binding::flat_rows(dy);
  const bool need_dz = need_x || need_weight || need_a || need_b, drops = dropout_p > 0;
  Tensor dx, dweight, dbias, da, db;
  const auto [dz, dmagnitude] =
      Backend::scale_backward(dy_rows, need_magnitude ? z : std::nullopt, magnitude, norms, need_dz);
  if (need_dz) {
    const Tensor x_rows = x ? binding::flat_rows(*x) : Tensor();
    const OptionalTensor dropped = x ? OptionalTensor(lora::dropout(x_rows, dropout_p, rng)) : std::nullopt;
    std::tie(dx, dweight, std::ignore, da, db) =
        lora::linear_backward(dz, dropped, weight, a, b, v, scaling, {need_x, need_weight, false, need_a, need_b});
    if (drops && need_x) {  // dx was drop(x)'s gradient so far; x also has the rest, x - drop(x)
      const Tensor rest = Backend::dense(dy_rows, weight->t());
      dx = lora::dropout(dx.sub(rest), dropout_p, rng).add(rest);
    }
    if (drops && need_weight) dweight = dweight.add(at::mm(dy_rows.t(), x_rows.sub(*dropped)));
  }
  if (need_x) dx = binding::unflattened(dx, dy);
  if (need_bias) dbias = dy_rows.sum(0);
  return {or_empty(need_x ? dx : Tensor(), dy),
          or_empty(need_weight ? dweight : Tensor(), dy),
          or_empty(dbias, dy),
          or_empty(need_a ? da : Tensor(), a),
          or_empty(need_b ? db : Tensor(), b),
          or_empty(need_magnitude ? dmagnitude.to(magnitude.scalar_type()) : Tensor(), magnitude)};
}

// Under autocast the base product runs in the lower precision, as nn.Linear does there. The norms are those of the
// weight as it is stored.
template <c10::DeviceType device>
Tensor cast(const Tensor& t) {
  return at::autocast::cached_cast(at::autocast::get_lower_precision_fp_from_device_type(device), t, device);
}

template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                       const Tensor& b, const Tensor& magnitude, const Tensor& norms, double scaling, double dropout_p,
                       const OptionalTensor& rng) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  const OptionalTensor cast_bias = bias ? OptionalTensor(cast<device>(*bias)) : bias;
  return call_linear(cast<device>(x), cast<device>(weight), cast_bias, a, b, magnitude, norms, scaling, dropout_p, rng);
}

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<Tensor, Tensor> linear_norms_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                 const Tensor& a, const Tensor& b, const Tensor& magnitude,
                                                 const OptionalTensor&, double scaling, double dropout_p,
                                                 const OptionalTensor& rng) {
  const Tensor norms = call_row_norms(weight, a, b, scaling);
  return {linear_autocast<key, device>(x, weight, bias, a, b, magnitude, norms, scaling, dropout_p, rng), norms};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("dora_row_squares(Tensor weight) -> Tensor", tags);
  m.def("dora_row_norms(Tensor weight, Tensor a, Tensor b, float scaling) -> Tensor", tags);
  m.def(
      "dora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor magnitude, Tensor norms, float "
      "scaling, float dropout_p=0.0, Tensor? rng=None) -> Tensor",
      tags);
  m.def(
      "dora_linear_norms(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor magnitude, Tensor? "
      "squares, float scaling, float dropout_p=0.0, Tensor? rng=None) -> (Tensor y, Tensor norms)",
      tags);
  m.def(
      "dora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor magnitude, Tensor? norms, "
      "Tensor? squares, float scaling, float dropout_p, Tensor? rng) -> (Tensor y, Tensor z, Tensor v, Tensor norms)",
      tags);
  m.def(
      "dora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor a, Tensor b, Tensor magnitude, Tensor norms, "
      "Tensor? z, Tensor? v, float scaling, float dropout_p, Tensor? rng, bool[6] needs) -> (Tensor dx, Tensor "
      "dweight, Tensor dbias, Tensor da, Tensor db, Tensor dmagnitude)",
      tags);
}

template <class Backend>
void implement(torch::Library& m) {
  m.impl("dora_row_squares", &row_squares<Backend>);
  m.impl("dora_row_norms", &row_norms<Backend>);
  m.impl("dora_linear", &linear<Backend>);
  m.impl("dora_linear_norms", &linear_norms<Backend>);
  m.impl("dora_linear_forward", &linear_forward<Backend>);
  m.impl("dora_linear_backward", &linear_backward<Backend>);
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) { implement<KernelBackend<OnCpu>>(m); }

#if defined(PYLORA_WITH_CUDA)
TORCH_LIBRARY_IMPL(pylora, CUDA, m) { implement<KernelBackend<OnCuda>>(m); }
#endif

TORCH_LIBRARY_IMPL(pylora, CompositeExplicitAutograd, m) { implement<AtenBackend>(m); }

TORCH_LIBRARY_IMPL(pylora, Autograd, m) {
  m.impl("dora_row_squares", &row_squares_autograd);
  m.impl("dora_row_norms", &row_norms_autograd);
  m.impl("dora_linear", &linear_autograd);
  m.impl("dora_linear_norms", &linear_norms_autograd);
}

TORCH_LIBRARY_IMPL(pylora, AutocastCPU, m) {
  m.impl("dora_linear", &linear_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
  m.impl("dora_linear_norms", &linear_norms_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(pylora, AutocastCUDA, m) {
  m.impl("dora_linear", &linear_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
  m.impl("dora_linear_norms", &linear_norms_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace pylora::dora
