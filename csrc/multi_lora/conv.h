// multi_lora_conv_: adds each row's adapter to a convolution's output, all adapters in one call
// (cpu/segments_conv.h). Its gradients are torch's convolutions, segment by segment. Included by op.cpp alone.
#pragma once

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "binding/pool_ops.h"
#include "cpu/segments_conv.h"
#include "multi_lora/adapters.h"

namespace pylora::multi_lora {

constexpr const char* kConv = "multi_lora_conv_";

/// The checked arguments of both directions; `like` is y or its gradient.
struct ConvCall {
  ConvGeometry geometry;
  std::vector<Tensor> flat_a, flat_b;  // [rank, in_channels * taps], [out_channels, rank / groups]
  std::vector<SegmentSlot> adapters;
  SegmentPlan plan;

  ConvCall(const char* name, const Tensor& like, const Tensor& x, PYLORA_SERVED_ARGS, PYLORA_SLIDING_ARGS) {
    const binding::Checks check(kConv);
    TORCH_CHECK_VALUE(x.dim() >= 3 && x.dim() <= 2 + kSpatialDims, kConv, ": x: expected 3 to 5 dimensions, got shape ",
                      x.sizes());
    check.same_dtype("x", x, name, like);
    check.same_device("x", x, name, like);
    const size_t dims = static_cast<size_t>(x.dim() - 2);
    for (const auto& [argument, values] : {std::pair{"stride", stride}, {"padding", padding}, {"dilation", dilation}}) {
      const int64_t least = argument[0] == 'p' ? 0 : 1;
      TORCH_CHECK_VALUE(values.size() == dims &&
                            std::all_of(values.begin(), values.end(), [=](int64_t value) { return value >= least; }),
                        kConv, ": ", argument, ": expected ", dims, " number(s) from ", least, " on, got ", values);
    }
    TORCH_CHECK_VALUE(groups >= 1, kConv, ": groups: expected 1 or more, got ", groups);
    check.shape(name, like, output_shape(x, like, a, PYLORA_SLIDING_NAMES));
    check_factors(x, like, a, b, groups);
    adapters = check_adapters(kConv, name, like, flat_a.empty() ? 0 : flat_a[0].size(1), like.size(1), flat_a, flat_b,
                              scalings, {}, std::nullopt, groups);
    plan = check_plan(kConv, name, like, like.size(0), static_cast<int64_t>(a.size()), order, indptr, slots);
  }

 private:
  /// Fills in the geometry.
  std::vector<int64_t> output_shape(const Tensor& x, const Tensor& like, TensorList a, PYLORA_SLIDING_ARGS) {
    std::vector<int64_t> shape = {x.size(0), -1};
    if (a.empty()) return std::vector<int64_t>(like.sizes().begin(), like.sizes().end());
    binding::Checks(kConv).shape("a", a[0], std::vector<int64_t>(static_cast<size_t>(x.dim()), -1));
    for (int64_t d = 0; d < x.dim() - 2; ++d) {
      const int64_t to = d + kSpatialDims - (x.dim() - 2);
      const size_t i = static_cast<size_t>(d);
      geometry.in[to] = x.size(2 + d);
      geometry.kernel[to] = a[0].size(2 + d);
      geometry.stride[to] = stride[i];
      geometry.padding[to] = padding[i];
      geometry.dilation[to] = dilation[i];
      const int64_t room = x.size(2 + d) + 2 * padding[i] - dilation[i] * (geometry.kernel[to] - 1) - 1;
      TORCH_CHECK_VALUE(geometry.kernel[to] > 0 && room >= 0, kConv,
                        ": a: expected a kernel that fits into x of shape ", x.sizes(), ", got shape ", a[0].sizes());
      geometry.out[to] = room / stride[i] + 1;
      shape.push_back(geometry.out[to]);
    }
    return shape;
  }

  void check_factors(const Tensor& x, const Tensor& like, TensorList a, TensorList b, int64_t groups) {
    const binding::Checks check(kConv);
    for (const Tensor& each : a) {
      std::vector<int64_t> shape(a[0].sizes().begin(), a[0].sizes().end());
      shape[0] = -1;
      shape[1] = x.size(1);
      check.shape("a", each, shape);
      TORCH_CHECK_VALUE(each.size(0) % groups == 0, kConv, ": a: expected a rank that ", groups,
                        " groups divide, got shape ", each.sizes());
      flat_a.push_back(each.flatten(1));
    }
    for (const Tensor& each : b) {
      std::vector<int64_t> shape(static_cast<size_t>(x.dim()), 1);
      shape[0] = like.size(1);
      shape[1] = -1;
      check.shape("b", each, shape);
      flat_b.push_back(each.flatten(1));
    }
    TORCH_CHECK_VALUE(like.size(1) % groups == 0, kConv, ": y: expected channels that ", groups,
                      " groups divide, got shape ", like.sizes());
  }
};

inline void conv(const Tensor& y, const Tensor& x, PYLORA_SERVED_ARGS, PYLORA_SLIDING_ARGS) {
  const ConvCall call("y", y, x, PYLORA_SERVED_NAMES, PYLORA_SLIDING_NAMES);
  TORCH_CHECK_VALUE(y.is_contiguous(), kConv, ": y: expected a contiguous tensor, got strides ", y.strides());
  const int64_t rank = largest_rank(call.adapters);
  if (rank == 0 || y.numel() == 0) return;
  const Tensor x_planes = x.contiguous();
  const auto sums = y.options().dtype(binding::accumulator_type(y.scalar_type()));
  const Tensor v = at::empty({x.size(0), rank, call.geometry.positions()}, sums);
  SegmentConv args;
  args.geometry = call.geometry;
  args.in_channels = x.size(1);
  args.out_channels = y.size(1);
  args.groups = groups;
  args.v_stride = rank;
  args.dtype = binding::to_dtype(y.scalar_type());
  args.plan = call.plan;
  args.slots = call.adapters.data();
  args.num_slots = static_cast<int64_t>(call.adapters.size());
  args.x = x_planes.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.v = v.mutable_data_ptr();
  const binding::CpuWorkspace workspace(segments_conv_workspace_bytes(args));
  args.workspace = workspace.data();
  binding::throw_unless_ok(segments_conv_cpu(binding::cpu_context(), args));
}

/// Gradients of x (empty unless it is wanted) and of all factors, computed in accumulators.
inline Gradients conv_backward(const Tensor& dy, const Tensor& x, PYLORA_SERVED_ARGS, PYLORA_SLIDING_ARGS,
                               bool need_x) {
  const binding::NoAutocast settled;
  const ConvCall call("dy", dy, x, PYLORA_SERVED_NAMES, PYLORA_SLIDING_NAMES);
  const auto sums_type = binding::accumulator_type(dy.scalar_type());
  const std::vector<int64_t> ones(stride.size(), 1), zeros(stride.size(), 0);
  const Tensor dx = need_x ? at::zeros(x.sizes(), x.options().dtype(sums_type)) : at::empty({0}, x.options());
  std::vector<Tensor> da, db;
  for (size_t i = 0; i < a.size(); ++i) {
    da.push_back(at::zeros_like(a[i], a[i].options().dtype(sums_type)));
    db.push_back(at::zeros_like(b[i], b[i].options().dtype(sums_type)));
  }
  for (int64_t s = 0; s < call.plan.num_segments; ++s) {
    const int64_t first = call.plan.begin_of(s), last = call.plan.begin_of(s + 1);
    if (call.plan.slots[s] < 0 || first == last) continue;
    const size_t slot = static_cast<size_t>(call.plan.slots[s]);
    const Tensor rows = order.slice(0, first, last);
    const Tensor a_sums = a[slot].to(sums_type), b_sums = b[slot].to(sums_type);
    const Tensor own_x = x.index_select(0, rows).to(sums_type);
    const Tensor own_dy = dy.index_select(0, rows).to(sums_type).mul_(scalings[slot]);
    const Tensor v = at::convolution(own_x, a_sums, {}, stride, padding, dilation, false, zeros, 1);
    const auto [g, own_db, unused_bias] = at::convolution_backward(
        own_dy, v, b_sums, at::OptionalIntArrayRef(), ones, zeros, ones, false, zeros, groups, {true, true, false});
    const auto [own_dx, own_da, unused_bias_too] = at::convolution_backward(
        g, own_x, a_sums, at::OptionalIntArrayRef(), stride, padding, dilation, false, zeros, 1, {need_x, true, false});
    da[slot].add_(own_da);
    db[slot].add_(own_db);
    if (need_x) dx.index_copy_(0, rows.to(at::kLong), own_dx);
  }
  to_dtypes_of(a, &da);
  to_dtypes_of(b, &db);
  return {dx.to(x.scalar_type()), da, db};
}

/// Saved for backward: x and the factors.
struct ConvFunction : torch::autograd::Function<ConvFunction> {
  using Context = torch::autograd::AutogradContext;

  static Tensor forward(Context* ctx, const Tensor& y, const Tensor& x, TensorList factors,
                        std::vector<double> scalings, variable_list plan, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
    const size_t count = factors.size() / 2;
    variable_list saved = {x};
    saved.insert(saved.end(), plan.begin(), plan.end());
    saved.insert(saved.end(), factors.begin(), factors.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["scalings"] = scalings;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->mark_dirty({y});
    const at::AutoDispatchBelowADInplaceOrView below;
    call_conv(y, x, factors.slice(0, count), factors.slice(count), scalings, plan[0], plan[1], plan[2], stride, padding,
              dilation, groups);
    return y;
  }

  static variable_list backward(Context* ctx, const variable_list& grad_outputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), kConv, ": no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const TensorList factors = TensorList(saved).slice(4);
    const size_t count = factors.size() / 2;
    auto& data = ctx->saved_data;
    const auto [dx, da, db] = call_conv_backward(
        grad_outputs[0], saved[0], factors.slice(0, count), factors.slice(count), data["scalings"].toDoubleVector(),
        saved[1], saved[2], saved[3], data["stride"].toIntVector(), data["padding"].toIntVector(),
        data["dilation"].toIntVector(), data["groups"].toInt(), ctx->needs_input_grad(1));
    variable_list result = {grad_outputs[0], ctx->needs_input_grad(1) ? dx : Tensor()};
    for (size_t i = 0; i < factors.size(); ++i)
      result.push_back(!ctx->needs_input_grad(2 + i) ? Tensor() : i < count ? da[i] : db[i - count]);
    result.resize(result.size() + 6);  // scalings, plan, stride, padding, dilation, groups
    return result;
  }
};

inline void conv_autograd(const Tensor& y, const Tensor& x, PYLORA_SERVED_ARGS, PYLORA_SLIDING_ARGS) {
  check_in_place(kConv, y);
  if (binding::any_requires_grad({x}) || binding::any_requires_grad(a) || binding::any_requires_grad(b)) {
    TORCH_CHECK_NOT_IMPLEMENTED(!binding::is_traced(y), kConv, ": no gradients in a traced graph");
    const std::vector<Tensor> factors = factors_of(a, b);
    ConvFunction::apply(y, x, TensorList(factors), scalings.vec(), variable_list{order, indptr, slots}, stride.vec(),
                        padding.vec(), dilation.vec(), groups);
    return;
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_conv(y, x, PYLORA_SERVED_NAMES, PYLORA_SLIDING_NAMES);
  }
  if (!y.is_inference()) y.unsafeGetTensorImpl()->bump_version();
}

}  // namespace pylora::multi_lora
