// pylora::lora_linear, lora_add and lora_dropout: schemas, checks, registration. autograd.h has the derivatives.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "lora/autograd.h"
#include "lora/backends.h"
#include "lora/checks.h"
#include "lora/cuda_backend.h"

namespace pylora::lora {
namespace {

// Outputs of a schema are always tensors: a gradient that nobody asked for is an empty one.
Tensor or_empty(const Tensor& grad, const Tensor& like) {
  return grad.defined() ? grad : at::empty({0}, like.options());
}

template <class Backend>
std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& a, const Tensor& b, double scaling, double dropout_p,
                                          const OptionalTensor& rng) {
  LoraChecks("lora_linear").linear(x, weight, bias, a, b, dropout_p, rng);
  const aten::NoAutocast settled;
  return Backend::linear(x, weight, bias, a, b, scaling, dropout_p, rng);
}

template <class Backend>
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a, const Tensor& b,
              double scaling, double dropout_p, const OptionalTensor& rng) {
  return std::get<0>(linear_forward<Backend>(x, weight, bias, a, b, scaling, dropout_p, rng));
}

/// What dora calls without a backward: its factor goes onto the sums of the product.
Tensor linear_scaled(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                     const Tensor& b, const Tensor& factor, double scaling) {
  const LoraChecks check("lora_linear_scaled");
  check.linear(x, weight, bias, a, b, 0.0, std::nullopt);
  check.factor(factor, x, weight.size(0));
  const aten::NoAutocast settled;
  return KernelBackend::scaled_linear(x, weight, bias, a, b, factor, scaling);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& a, const Tensor& b,
    const OptionalTensor& v, double scaling, double dropout_p, const OptionalTensor& rng, std::array<bool, 5> needs) {
  const auto [need_x, need_weight, need_bias, need_a, need_b] = needs;
  const LoraChecks check("lora_linear_backward");
  check.delta_backward(dy, x, a, b, v, dropout_p, rng, need_a || need_weight, need_b);
  if (need_x) check.base_backward(dy, weight, a);
  const aten::NoAutocast settled;
  const aten::BaseGradients base = aten::base_backward(dy, x, weight, {need_x, need_weight, need_bias}, Backend::dense);
  aten::Gradients grads;
  const DeltaNeeds delta{need_x, need_a, need_b};
  if (delta.any()) grads = Backend::backward(base.dx, dy, x, a, b, v, scaling, dropout_p, rng, delta);
  return {or_empty(grads.dx, dy), or_empty(base.dweight, dy), or_empty(base.dbias, dy), or_empty(grads.da, a),
          or_empty(grads.db, b)};
}

template <class Backend>
std::tuple<Tensor, Tensor> add_forward(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b,
                                       double scaling, double dropout_p, const OptionalTensor& rng) {
  LoraChecks("lora_add").add(base, x, a, b, dropout_p, rng);
  const aten::NoAutocast settled;
  const Tensor y = at::empty_like(base, base.options(), at::MemoryFormat::Contiguous).copy_(base);
  return Backend::forward(y, x, a, b, scaling, dropout_p, rng);
}

template <class Backend>
Tensor add(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b, double scaling, double dropout_p,
           const OptionalTensor& rng) {
  return std::get<0>(add_forward<Backend>(base, x, a, b, scaling, dropout_p, rng));
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> add_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& a,
                                                const Tensor& b, const OptionalTensor& v, double scaling,
                                                double dropout_p, const OptionalTensor& rng,
                                                std::array<bool, 3> needs) {
  const DeltaNeeds delta{needs[0], needs[1], needs[2]};
  LoraChecks("lora_add_backward").delta_backward(dy, x, a, b, v, dropout_p, rng, delta.da, delta.db);
  const aten::NoAutocast settled;
  const Tensor dx = delta.dx ? at::zeros(aten::with_width(dy, a.size(1)), dy.options()) : Tensor();
  const aten::Gradients grads = Backend::backward(dx, dy, x, a, b, v, scaling, dropout_p, rng, delta);
  return {or_empty(grads.dx, dy), or_empty(grads.da, a), or_empty(grads.db, b)};
}

template <Status (*launch)(const Context&, const DropoutArgs&)>
Tensor dropout(const Tensor& x, double dropout_p, const OptionalTensor& rng) {
  const binding::Checks check("lora_dropout");
  check.dim_at_least("x", x, 1);
  check.kernel_dtype("x", x);
  check.dropout(dropout_p, rng, x);
  const Tensor out = at::empty_like(x, x.options(), at::MemoryFormat::Contiguous);
  if (!dropout_of(dropout_p, rng).active()) return out.copy_(x);
  const Tensor x_rows = token_rows(x);
  const c10::DeviceGuard guard(x.device());
  DropoutArgs args{x_rows.size(0),
                   x_rows.size(1),
                   binding::to_dtype(x.scalar_type()),
                   dropout_of(dropout_p, rng),
                   matrix(x_rows),
                   {out.mutable_data_ptr(), x_rows.size(1), 1}};
  const Context context = x.is_cpu() ? binding::cpu_context() : binding::device_context(x.device());
  binding::throw_unless_ok(launch(context, args));
  return out;
}

// Under autocast the base product runs in the lower precision, as nn.Linear does there; the factors keep their dtype,
// since the kernels take f32 factors beside 16-bit activations without a converted copy of either.
template <c10::DeviceType device>
Tensor cast(const Tensor& t) {
  return at::autocast::cached_cast(at::autocast::get_lower_precision_fp_from_device_type(device), t, device);
}

template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                       const Tensor& b, double scaling, double dropout_p, const OptionalTensor& rng) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  const OptionalTensor cast_bias = bias ? OptionalTensor(cast<device>(*bias)) : bias;
  return call_linear(cast<device>(x), cast<device>(weight), cast_bias, a, b, scaling, dropout_p, rng);
}

template <c10::DispatchKey key, c10::DeviceType device>
Tensor add_autocast(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b, double scaling,
                    double dropout_p, const OptionalTensor& rng) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  return call_add(cast<device>(base), cast<device>(x), a, b, scaling, dropout_p, rng);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scaling, float "
      "dropout_p=0.0, "
      "Tensor? rng=None) -> Tensor",
      tags);
  m.def(
      "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scaling, "
      "float dropout_p=0.0, Tensor? rng=None) -> (Tensor y, Tensor v)",
      tags);
  m.def(
      "lora_linear_scaled(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor factor, float scaling) -> "
      "Tensor",
      tags);
  m.def(
      "lora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor a, Tensor b, Tensor? v, float scaling, "
      "float dropout_p, Tensor? rng, bool[5] needs) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor da, "
      "Tensor db)",
      tags);
  m.def(
      "lora_add(Tensor base, Tensor x, Tensor a, Tensor b, float scaling, float dropout_p=0.0, Tensor? "
      "rng=None) -> Tensor",
      tags);
  m.def(
      "lora_add_forward(Tensor base, Tensor x, Tensor a, Tensor b, float scaling, float dropout_p=0.0, "
      "Tensor? rng=None) -> (Tensor y, Tensor v)",
      tags);
  m.def(
      "lora_add_backward(Tensor dy, Tensor? x, Tensor a, Tensor b, Tensor? v, float scaling, float dropout_p, "
      "Tensor? rng, bool[3] needs) -> (Tensor dx, Tensor da, Tensor db)",
      tags);
  m.def("lora_dropout(Tensor x, float dropout_p, Tensor? rng) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) {
  m.impl("lora_linear", &linear<KernelBackend>);
  m.impl("lora_linear_forward", &linear_forward<KernelBackend>);
  m.impl("lora_linear_scaled", &linear_scaled);
  m.impl("lora_linear_backward", &linear_backward<KernelBackend>);
  m.impl("lora_add", &add<KernelBackend>);
  m.impl("lora_add_forward", &add_forward<KernelBackend>);
  m.impl("lora_add_backward", &add_backward<KernelBackend>);
  m.impl("lora_dropout", &dropout<dropout_cpu>);
}

TORCH_LIBRARY_IMPL(pylora, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", &linear<AtenBackend>);
  m.impl("lora_linear_forward", &linear_forward<AtenBackend>);
  m.impl("lora_linear_backward", &linear_backward<AtenBackend>);
  m.impl("lora_add", &add<AtenBackend>);
  m.impl("lora_add_forward", &add_forward<AtenBackend>);
  m.impl("lora_add_backward", &add_backward<AtenBackend>);
}

#if defined(PYLORA_WITH_CUDA)
TORCH_LIBRARY_IMPL(pylora, CUDA, m) {
  m.impl("lora_linear", &linear<CudaBackend>);
  m.impl("lora_linear_forward", &linear_forward<CudaBackend>);
  m.impl("lora_linear_backward", &linear_backward<CudaBackend>);
  m.impl("lora_add", &add<CudaBackend>);
  m.impl("lora_add_forward", &add_forward<CudaBackend>);
  m.impl("lora_add_backward", &add_backward<CudaBackend>);
  m.impl("lora_dropout", &dropout<dropout_cuda>);
}
#endif

TORCH_LIBRARY_IMPL(pylora, Autograd, m) {
  m.impl("lora_linear", &linear_autograd);
  m.impl("lora_add", &add_autograd);
  m.impl("lora_dropout", &dropout_autograd);
}

TORCH_LIBRARY_IMPL(pylora, AutocastCPU, m) {
  m.impl("lora_linear", &linear_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
  m.impl("lora_add", &add_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(pylora, AutocastCUDA, m) {
  m.impl("lora_linear", &linear_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
  m.impl("lora_add", &add_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace pylora::lora
