// pylora::multi_lora_linear: schema, checks, kernels, derivatives. The family's other ops are in headers beside it.
#include "multi_lora/multi_lora.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "multi_lora/adapters.h"
#include "multi_lora/conv.h"
#include "multi_lora/cuda_backend.h"
#include "multi_lora/embedding.h"

namespace pylora::multi_lora {
namespace {

constexpr const char* kOp = "multi_lora_linear";

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          PYLORA_MULTI_LORA_ARGS) {
  const binding::Checks check(kOp);
  check.dim_at_least("x", x, 1);
  check.shape("weight", weight, {-1, x.size(-1)});
  check.same_dtype("weight", weight, "x", x);
  check.same_device("weight", weight, "x", x);
  if (bias) {
    check.shape("bias", *bias, {weight.size(0)});
    check.same_dtype("bias", *bias, "x", x);
    check.same_device("bias", *bias, "x", x);
  }
  const auto adapters = check_adapters(kOp, "x", x, x.size(-1), weight.size(0), a, b, scalings, dropout, rng);
  const binding::NoAutocast settled;
  const Tensor x_rows = binding::with_unit_columns(binding::flat_rows(x));
  const SegmentPlan plan =
      check_plan(kOp, "x", x, x_rows.size(0), static_cast<int64_t>(a.size()), order, indptr, slots);
  const Tensor y = binding::dense_product(x_rows, weight, bias);
  SegmentForward args;
  args.shape = {x.size(-1), weight.size(0), largest_rank(adapters), binding::to_dtype(x.scalar_type())};
  args.plan = plan;
  args.slots = adapters.data();
  args.x = binding::matrix(x_rows);
  args.y = {y.mutable_data_ptr(), weight.size(0), 1};
  const Tensor v =
      at::empty({x_rows.size(0), args.shape.v_stride}, x.options().dtype(binding::accumulator_type(x.scalar_type())));
  args.v = v.mutable_data_ptr();
#if defined(PYLORA_WITH_CUDA)
  if (!x.is_cpu()) {
    on_cuda::forward(on_cuda::batch_of(args.shape, plan, adapters, x_rows), x_rows, y, v);
    return {y.view(binding::shape_with_width(x, weight.size(0))), v};
  }
#endif
  binding::throw_unless_ok(segments_forward_cpu(binding::cpu_context(), args));
  return {y.view(binding::shape_with_width(x, weight.size(0))), v};
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, PYLORA_MULTI_LORA_ARGS) {
  return std::get<0>(linear_forward(x, weight, bias, PYLORA_MULTI_LORA_NAMES));
}

/// Gradients of x, and of all factors or none. An adapter that no row uses gets zeros.
Gradients linear_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& v,
                          PYLORA_MULTI_LORA_ARGS, bool need_x, bool need_factors) {
  const binding::NoAutocast settled;
  const binding::Checks check(kOp);
  check.dim_at_least("dy", dy, 1);
  check.shape("x", x, binding::shape_with_width(dy, -1));
  check.same_dtype("x", x, "dy", dy);
  const int64_t in_features = x.size(-1), out_features = dy.size(-1);
  const auto adapters = check_adapters(kOp, "dy", dy, in_features, out_features, a, b, scalings, dropout, rng);
  const Tensor dy_rows = binding::with_unit_columns(binding::flat_rows(dy)),
               x_rows = binding::with_unit_columns(binding::flat_rows(x));
  const int64_t rank = largest_rank(adapters);
  check.shape("v", v, {dy_rows.size(0), rank});
  const auto sums = dy.options().dtype(binding::accumulator_type(dy.scalar_type()));
  SegmentBackward args;
  args.plan = check_plan(kOp, "dy", dy, dy_rows.size(0), static_cast<int64_t>(a.size()), order, indptr, slots);
  Tensor dx = at::empty({0}, dy.options());
  if (need_x) {
    TORCH_CHECK_VALUE(weight.has_value(), kOp, ": weight: expected a tensor for x's gradient, got None");
    check.shape("weight", *weight, {out_features, in_features});
    dx = binding::dense_product(dy_rows, weight->t(), std::nullopt);
    args.dx = {dx.mutable_data_ptr(), in_features, 1};
  }
#if defined(PYLORA_WITH_CUDA)
  if (!dy.is_cpu()) {
    const SegmentShape shape = {in_features, out_features, rank, binding::to_dtype(dy.scalar_type())};
    auto grads = on_cuda::backward(on_cuda::batch_of(shape, args.plan, adapters, dy_rows), dy_rows, x_rows, v,
                                   need_x ? dx : Tensor(), a, b, need_factors);
    return {need_x ? dx.view(binding::shape_with_width(dy, in_features)) : dx, std::move(grads.da),
            std::move(grads.db)};
  }
#endif
  FactorSums factor_sums(need_factors ? a : TensorList(), need_factors ? b : TensorList(), sums);
  const Tensor g = at::empty({dy_rows.size(0), rank}, sums);
  args.shape = {in_features, out_features, rank, binding::to_dtype(dy.scalar_type())};
  args.slots = adapters.data();
  args.dy = binding::matrix(dy_rows);
  args.x = binding::matrix(x_rows);
  args.v = v.const_data_ptr();
  args.g = g.mutable_data_ptr();
  args.da = need_factors ? factor_sums.da_pointers.data() : nullptr;
  args.db = need_factors ? factor_sums.db_pointers.data() : nullptr;
  binding::throw_unless_ok(segments_backward_cpu(binding::cpu_context(), args));
  auto [da, db] = factor_sums.as_gradients(a, b);
  return {need_x ? dx.view(binding::shape_with_width(dy, in_features)) : dx, std::move(da), std::move(db)};
}

#if defined(PYLORA_WITH_CUDA)
std::tuple<Tensor, Tensor> linear_forward_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                               PYLORA_MULTI_LORA_ARGS) {
  return linear_forward(x, weight, bias, on_cuda::of_one_dtype(a), on_cuda::of_one_dtype(b), scalings, dropout, rng,
                        order, indptr, slots);
}

Tensor linear_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, PYLORA_MULTI_LORA_ARGS) {
  return std::get<0>(linear_forward_cuda(x, weight, bias, PYLORA_MULTI_LORA_NAMES));
}

Gradients linear_backward_cuda(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& v,
                               PYLORA_MULTI_LORA_ARGS, bool need_x, bool need_factors) {
  auto [dx, da, db] = linear_backward(dy, x, weight, v, on_cuda::of_one_dtype(a), on_cuda::of_one_dtype(b), scalings,
                                      dropout, rng, order, indptr, slots, need_x, need_factors);
  to_dtypes_of(a, &da);
  to_dtypes_of(b, &db);
  return {dx, da, db};
}

void embedding_on_cuda(const Tensor& y, const Tensor& tokens, PYLORA_SERVED_ARGS, int64_t padding_idx) {
  embedding(y, tokens, on_cuda::of_one_dtype(a), on_cuda::of_one_dtype(b), scalings, order, indptr, slots, padding_idx);
}

FactorGradients embedding_backward_on_cuda(const Tensor& dy, const Tensor& tokens, PYLORA_SERVED_ARGS,
                                           int64_t padding_idx) {
  auto [da, db] = embedding_backward(dy, tokens, on_cuda::of_one_dtype(a), on_cuda::of_one_dtype(b), scalings, order,
                                     indptr, slots, padding_idx);
  to_dtypes_of(a, &da);
  to_dtypes_of(b, &db);
  return {da, db};
}
#endif

// ---- derivatives ----

using torch::autograd::AutogradContext;

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  enum Edge { kX, kWeight, kFactors };  // then bias, if there is one

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, TensorList factors,
                        const OptionalTensor& bias, const OptionalTensor& rng, std::vector<double> scalings,
                        std::vector<double> dropout, variable_list plan) {
    const size_t count = factors.size() / 2;
    Tensor y, v;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      std::tie(y, v) = call_forward(x, weight, bias, factors.slice(0, count), factors.slice(count), scalings, dropout,
                                    rng, plan[0], plan[1], plan[2]);
    }
    variable_list saved = {x, weight, v, rng.value_or(Tensor())};
    saved.insert(saved.end(), plan.begin(), plan.end());
    saved.insert(saved.end(), factors.begin(), factors.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["scalings"] = scalings;
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), kOp, ": no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &dy = grad_outputs[0];
    const OptionalTensor rng = saved[3].defined() ? OptionalTensor(saved[3]) : std::nullopt;
    constexpr size_t kFirstFactor = 7;
    const size_t factors = saved.size() - kFirstFactor;
    const TensorList list = TensorList(saved).slice(kFirstFactor);
    bool need_factors = false;
    for (size_t i = 0; i < factors; ++i)
      need_factors = need_factors || ctx->needs_input_grad(kFactors + i);
    const auto [dx, da, db] =
        call_backward(dy, x, saved[1], saved[2], list.slice(0, factors / 2), list.slice(factors / 2),
                      ctx->saved_data["scalings"].toDoubleVector(), ctx->saved_data["dropout"].toDoubleVector(), rng,
                      saved[4], saved[5], saved[6], ctx->needs_input_grad(kX), need_factors);
    const bool has_bias = ctx->saved_data["bias"].toBool();
    const Tensor dweight =
        ctx->needs_input_grad(kWeight) ? at::mm(binding::flat_rows(dy).t(), binding::flat_rows(x)) : Tensor();
    const Tensor dbias =
        has_bias && ctx->needs_input_grad(kFactors + factors) ? at::sum(binding::flat_rows(dy), 0) : Tensor();
    variable_list result = {ctx->needs_input_grad(kX) ? dx : Tensor(), dweight};
    for (size_t i = 0; i < factors; ++i) {
      const std::vector<Tensor>& grads = i < factors / 2 ? da : db;
      result.push_back(ctx->needs_input_grad(kFactors + i) ? grads[i % (factors / 2)] : Tensor());
    }
    result.push_back(dbias);
    result.resize(result.size() + 4);  // rng, scalings, dropout, plan
    return result;
  }
};

bool wants_grad(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, TensorList a, TensorList b) {
  const auto wants = [](const Tensor& t) { return t.requires_grad(); };
  return at::GradMode::is_enabled() &&
         (wants(x) || wants(weight) || (bias && wants(*bias)) || std::any_of(a.begin(), a.end(), wants) ||
          std::any_of(b.begin(), b.end(), wants));
}

Tensor linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, PYLORA_MULTI_LORA_ARGS) {
  if (wants_grad(x, weight, bias, a, b)) {
    const std::vector<Tensor> factors = factors_of(a, b);
    return LinearFunction::apply(x, weight, TensorList(factors), bias, rng, scalings.vec(), dropout.vec(),
                                 variable_list{order, indptr, slots});
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(x, weight, bias, PYLORA_MULTI_LORA_NAMES);
}

template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, PYLORA_MULTI_LORA_ARGS) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  const auto cast = [](const Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_lower_precision_fp_from_device_type(device), t, device);
  };
  return call_linear(cast(x), cast(weight), bias ? OptionalTensor(cast(*bias)) : bias, PYLORA_MULTI_LORA_NAMES);
}

}  // namespace

#define PYLORA_MULTI_LORA_SCHEMA                                                                                 \
  "Tensor[] a, Tensor[] b, float[] scalings, float[] dropout, Tensor? rng, Tensor order, Tensor indptr, Tensor " \
  "slots"

#define PYLORA_SERVED_SCHEMA "Tensor[] a, Tensor[] b, float[] scalings, Tensor order, Tensor indptr, Tensor slots"

#define PYLORA_SLIDING_SCHEMA "int[] stride, int[] padding, int[] dilation, int groups"

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("multi_lora_linear(Tensor x, Tensor weight, Tensor? bias, " PYLORA_MULTI_LORA_SCHEMA ") -> Tensor", tags);
  m.def("multi_lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, " PYLORA_MULTI_LORA_SCHEMA
        ") -> (Tensor y, Tensor v)",
        tags);
  m.def("multi_lora_linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor v, " PYLORA_MULTI_LORA_SCHEMA
        ", bool need_x, bool need_factors) -> (Tensor dx, Tensor[] da, Tensor[] db)",
        tags);
  m.def("multi_lora_embedding_(Tensor(a!) y, Tensor tokens, " PYLORA_SERVED_SCHEMA ", int padding_idx) -> ()", tags);
  m.def("multi_lora_embedding_backward(Tensor dy, Tensor tokens, " PYLORA_SERVED_SCHEMA
        ", int padding_idx) -> (Tensor[] da, Tensor[] db)",
        tags);
  m.def("multi_lora_conv_(Tensor(a!) y, Tensor x, " PYLORA_SERVED_SCHEMA ", " PYLORA_SLIDING_SCHEMA ") -> ()", tags);
  m.def("multi_lora_conv_backward(Tensor dy, Tensor x, " PYLORA_SERVED_SCHEMA ", " PYLORA_SLIDING_SCHEMA
        ", bool need_x) -> (Tensor dx, Tensor[] da, Tensor[] db)",
        tags);
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) {
  m.impl("multi_lora_linear", &linear);
  m.impl("multi_lora_linear_forward", &linear_forward);
  m.impl("multi_lora_linear_backward", &linear_backward);
  m.impl("multi_lora_embedding_", &embedding);
  m.impl("multi_lora_embedding_backward", &embedding_backward);
  m.impl("multi_lora_conv_", &conv);
  m.impl("multi_lora_conv_backward", &conv_backward);
}

#if defined(PYLORA_WITH_CUDA)
TORCH_LIBRARY_IMPL(pylora, CUDA, m) {
  m.impl("multi_lora_linear", &linear_cuda);
  m.impl("multi_lora_linear_forward", &linear_forward_cuda);
  m.impl("multi_lora_linear_backward", &linear_backward_cuda);
  m.impl("multi_lora_embedding_", &embedding_on_cuda);
  m.impl("multi_lora_embedding_backward", &embedding_backward_on_cuda);
}
#endif

TORCH_LIBRARY_IMPL(pylora, Autograd, m) {
  m.impl("multi_lora_linear", &linear_autograd);
  m.impl("multi_lora_embedding_", &embedding_autograd);
  m.impl("multi_lora_conv_", &conv_autograd);
}

TORCH_LIBRARY_IMPL(pylora, AutocastCPU, m) {
  m.impl("multi_lora_linear", &linear_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(pylora, AutocastCUDA, m) {
  m.impl("multi_lora_linear", &linear_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace pylora::multi_lora
