// pylora::multi_lora_linear: schema, checks, kernels, derivatives.
#include "multi_lora/multi_lora.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "binding/segments.h"

namespace pylora::multi_lora {
namespace {

constexpr const char* kOp = "multi_lora_linear";

/// Inside the op, dtypes are settled.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

/// Leading dimensions flattened; counted, since -1 is ambiguous for a width of 0.
Tensor rows_of(const Tensor& t) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    count *= t.size(i);
  return t.reshape({count, t.size(-1)});
}

std::vector<int64_t> with_width(const Tensor& t, int64_t width) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = width;
  return shape;
}

SegmentPlan check_plan(const Tensor& like, int64_t num_tokens, int64_t num_adapters, const Tensor& order,
                       const Tensor& indptr, const Tensor& slots) {
  binding::check_indices(kOp, "order", order, -1);
  binding::check_indices(kOp, "slots", slots, -1);
  const int64_t num_rows = order.size(0);
  binding::check_indptr(kOp, "indptr", indptr, slots.size(0), num_rows);
  binding::check_slots(kOp, "slots", slots, num_adapters);
  TORCH_CHECK_VALUE(num_rows == 0 ? num_tokens == 0 : like.dim() >= 2 && like.size(0) == num_rows, kOp,
                    ": x: expected ", num_rows, " rows, as the plan has, got shape ", like.sizes());
  const int32_t* row = order.const_data_ptr<int32_t>();
  std::vector<bool> seen(static_cast<size_t>(num_rows));
  for (int64_t i = 0; i < num_rows; ++i) {
    const bool fits = row[i] >= 0 && row[i] < num_rows && !seen[static_cast<size_t>(row[i])];
    TORCH_CHECK_VALUE(fits, kOp, ": order: expected each row from 0 to ", num_rows - 1, " once, got ", row[i], " at ",
                      i);
    seen[static_cast<size_t>(row[i])] = true;
  }
  SegmentPlan plan;
  plan.num_segments = slots.size(0);
  plan.tokens_per_row = num_rows > 0 ? num_tokens / num_rows : 1;
  plan.order = row;
  plan.indptr = indptr.const_data_ptr<int32_t>();
  plan.slots = slots.const_data_ptr<int32_t>();
  return plan;
}

std::vector<SegmentSlot> check_adapters(const Tensor& like, int64_t in_features, int64_t out_features, TensorList a,
                                        TensorList b, Doubles scalings, Doubles dropout, const OptionalTensor& rng) {
  const binding::Checks check(kOp);
  check.kernel_dtype("x", like);
  TORCH_CHECK_VALUE(b.size() == a.size() && scalings.size() == a.size(), kOp, ": b: expected as many as a, ", a.size(),
                    ", got ", b.size(), " and ", scalings.size(), " scalings");
  TORCH_CHECK_VALUE(dropout.empty() || dropout.size() == a.size(), kOp, ": dropout: expected none or ", a.size(),
                    ", got ", dropout.size());
  std::vector<SegmentSlot> slots(a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    check.kernel_dtype("a", a[i]);
    check.shape("a", a[i], {-1, in_features});
    check.shape("b", b[i], {out_features, a[i].size(0)});
    check.same_dtype("b", b[i], "a", a[i]);
    check.same_device("a", a[i], "x", like);
    check.same_device("b", b[i], "x", like);
    const double p = dropout.empty() ? 0.0 : dropout[i];
    check.dropout(p, rng, like);
    SegmentSlot& slot = slots[i];
    slot.a = binding::matrix(a[i]);
    slot.b = binding::matrix(b[i]);
    slot.rank = a[i].size(0);
    slot.scaling = scalings[i];
    slot.dtype = binding::to_dtype(a[i].scalar_type());
    if (p > 0) slot.dropout = make_dropout(p, rng->const_data_ptr<int64_t>());
  }
  return slots;
}

int64_t largest_rank(const std::vector<SegmentSlot>& slots) {
  int64_t rank = 0;
  for (const SegmentSlot& slot : slots)
    rank = std::max(rank, slot.rank);
  return rank;
}

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
  const auto adapters = check_adapters(x, x.size(-1), weight.size(0), a, b, scalings, dropout, rng);
  const NoAutocast settled;
  const Tensor x_rows = binding::with_unit_columns(rows_of(x));
  const SegmentPlan plan = check_plan(x, x_rows.size(0), static_cast<int64_t>(a.size()), order, indptr, slots);
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
  binding::throw_unless_ok(segments_forward_cpu(binding::cpu_context(), args));
  return {y.view(with_width(x, weight.size(0))), v};
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, PYLORA_MULTI_LORA_ARGS) {
  return std::get<0>(linear_forward(x, weight, bias, PYLORA_MULTI_LORA_NAMES));
}

/// Gradients of x, and of all factors or none. An adapter that no row uses gets zeros.
Gradients linear_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& v,
                          PYLORA_MULTI_LORA_ARGS, bool need_x, bool need_factors) {
  const NoAutocast settled;
  const binding::Checks check(kOp);
  check.dim_at_least("dy", dy, 1);
  check.shape("x", x, with_width(dy, -1));
  check.same_dtype("x", x, "dy", dy);
  const int64_t in_features = x.size(-1), out_features = dy.size(-1);
  const auto adapters = check_adapters(dy, in_features, out_features, a, b, scalings, dropout, rng);
  const Tensor dy_rows = binding::with_unit_columns(rows_of(dy)), x_rows = binding::with_unit_columns(rows_of(x));
  const int64_t rank = largest_rank(adapters);
  check.shape("v", v, {dy_rows.size(0), rank});
  const auto sums = dy.options().dtype(binding::accumulator_type(dy.scalar_type()));
  SegmentBackward args;
  args.plan = check_plan(dy, dy_rows.size(0), static_cast<int64_t>(a.size()), order, indptr, slots);
  Tensor dx = at::empty({0}, dy.options());
  if (need_x) {
    TORCH_CHECK_VALUE(weight.has_value(), kOp, ": weight: expected a tensor for x's gradient, got None");
    check.shape("weight", *weight, {out_features, in_features});
    dx = binding::dense_product(dy_rows, weight->t(), std::nullopt);
    args.dx = {dx.mutable_data_ptr(), in_features, 1};
  }
  std::vector<Tensor> da, db;
  std::vector<void*> da_sums, db_sums;
  for (size_t i = 0; need_factors && i < a.size(); ++i) {
    da.push_back(at::zeros({a[i].size(0), in_features}, sums));
    db.push_back(at::zeros({a[i].size(0), out_features}, sums));
    da_sums.push_back(da.back().mutable_data_ptr());
    db_sums.push_back(db.back().mutable_data_ptr());
  }
  const Tensor g = at::empty({dy_rows.size(0), rank}, sums);
  args.shape = {in_features, out_features, rank, binding::to_dtype(dy.scalar_type())};
  args.slots = adapters.data();
  args.dy = binding::matrix(dy_rows);
  args.x = binding::matrix(x_rows);
  args.v = v.const_data_ptr();
  args.g = g.mutable_data_ptr();
  args.da = need_factors ? da_sums.data() : nullptr;
  args.db = need_factors ? db_sums.data() : nullptr;
  binding::throw_unless_ok(segments_backward_cpu(binding::cpu_context(), args));
  for (size_t i = 0; i < da.size(); ++i) {
    da[i] = da[i].to(a[i].scalar_type());
    db[i] = db[i].t().contiguous().to(b[i].scalar_type());
  }
  return {need_x ? dx.view(with_width(dy, in_features)) : dx, da, db};
}

// ---- derivatives ----

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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
    const Tensor dweight = ctx->needs_input_grad(kWeight) ? at::mm(rows_of(dy).t(), rows_of(x)) : Tensor();
    const Tensor dbias = has_bias && ctx->needs_input_grad(kFactors + factors) ? at::sum(rows_of(dy), 0) : Tensor();
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
    std::vector<Tensor> factors(a.begin(), a.end());
    factors.insert(factors.end(), b.begin(), b.end());
    return LinearFunction::apply(x, weight, TensorList(factors), bias, rng, scalings.vec(), dropout.vec(),
                                 variable_list{order, indptr, slots});
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(x, weight, bias, PYLORA_MULTI_LORA_NAMES);
}

Tensor linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, PYLORA_MULTI_LORA_ARGS) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::AutocastCPU);
  const auto cast = [](const Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_lower_precision_fp_from_device_type(c10::DeviceType::CPU), t,
                                     c10::DeviceType::CPU);
  };
  return call_linear(cast(x), cast(weight), bias ? OptionalTensor(cast(*bias)) : bias, PYLORA_MULTI_LORA_NAMES);
}

}  // namespace

#define PYLORA_MULTI_LORA_SCHEMA                                                                                 \
  "Tensor[] a, Tensor[] b, float[] scalings, float[] dropout, Tensor? rng, Tensor order, Tensor indptr, Tensor " \
  "slots"

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("multi_lora_linear(Tensor x, Tensor weight, Tensor? bias, " PYLORA_MULTI_LORA_SCHEMA ") -> Tensor", tags);
  m.def("multi_lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, " PYLORA_MULTI_LORA_SCHEMA
        ") -> (Tensor y, Tensor v)",
        tags);
  m.def("multi_lora_linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor v, " PYLORA_MULTI_LORA_SCHEMA
        ", bool need_x, bool need_factors) -> (Tensor dx, Tensor[] da, Tensor[] db)",
        tags);
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) {
  m.impl("multi_lora_linear", &linear);
  m.impl("multi_lora_linear_forward", &linear_forward);
  m.impl("multi_lora_linear_backward", &linear_backward);
}

TORCH_LIBRARY_IMPL(pylora, Autograd, m) { m.impl("multi_lora_linear", &linear_autograd); }

TORCH_LIBRARY_IMPL(pylora, AutocastCPU, m) { m.impl("multi_lora_linear", &linear_autocast); }

}  // namespace pylora::multi_lora
