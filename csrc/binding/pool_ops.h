// The four ops of sgmv and of bgmv, which differ in how a plan is given: `Rows` holds those tensors.
//   static const char* kAdd, kShrink, kExpand          names, for messages
//   Rows(tensors).plan(op, like, num_slots)            checks them and makes the plan, which lives as long as Rows; like:
//                                                      the activations, a row a token
//   Rows(tensors).call_add(...)                        the op, through the dispatcher
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "binding/segments.h"

namespace pylora::binding {

template <class Rows>
struct PoolOps {
  static Tensor add_recording(const Tensor& y, const Tensor& x, at::TensorList a, at::TensorList b, const Tensor& ranks,
                              const Tensor& scalings, Rows rows, bool out_first) {
    const Pools pools{Rows::kAdd, a, b, ranks, &scalings, out_first};
    const SegmentPlan plan = check(pools, rows, x);
    const Tensor v = new_v(x, static_cast<int64_t>(a.size()), x.size(0), pools.max_rank());
    check_output(pools, y, x);
    pools_forward(pools, plan, x, v, y);
    return v;
  }

  static Tensor shrink(const Tensor& x, at::TensorList a, const Tensor& ranks, Rows rows) {
    const Pools pools{Rows::kShrink, a, {}, ranks, nullptr};
    const SegmentPlan plan = check(pools, rows, x);
    const Tensor v = new_v(x, static_cast<int64_t>(a.size()), x.size(0), pools.max_rank()).zero_();
    pools_shrink(pools, plan, x, v);
    return v;
  }

  static void expand(const Tensor& y, const Tensor& v, at::TensorList b, const Tensor& ranks, const Tensor& scalings,
                     Rows rows, bool out_first) {
    const Pools pools{Rows::kExpand, {}, b, ranks, &scalings, out_first};
    Checks(Rows::kExpand).dim_at_least("y", y, 2);
    pools.check(y);
    Checks(Rows::kExpand).shape("v", v, {static_cast<int64_t>(b.size()), y.size(0), pools.max_rank()});
    Checks(Rows::kExpand).same_device("v", v, "y", y);
    TORCH_CHECK_TYPE(v.scalar_type() == accumulator_type(y.scalar_type()), Rows::kExpand, ": v: expected ",
                     accumulator_type(y.scalar_type()), ", got ", v.scalar_type());
    check_width(pools, y, y.size(0));
    const SegmentPlan plan = rows.plan(Rows::kExpand, y, pools.num_slots());
    pools_expand(pools, plan, v.contiguous(), y);
  }

 private:
  static SegmentPlan check(const Pools& pools, Rows& rows, const Tensor& x) {
    Checks(pools.op).shape("x", x, {-1, -1});
    pools.check(x);
    check_rows(pools.op, "x", x, -1, pools.a[0].size(2));
    return rows.plan(pools.op, x, pools.num_slots());
  }

  static void check_width(const Pools& pools, const Tensor& y, int64_t num_tokens) {
    int64_t width = 0;
    for (const Tensor& pool : pools.b)
      width += pools.out_features(pool);
    check_rows(pools.op, "y", y, num_tokens, width);
    check_written(pools.op, y);
  }

  static void check_output(const Pools& pools, const Tensor& y, const Tensor& x) {
    check_width(pools, y, x.size(0));
    Checks(pools.op).same_dtype("y", y, "x", x);
    Checks(pools.op).same_device("y", y, "x", x);
    at::assert_no_overlap(y, x);
  }
};

/// y += ... with gradients for y, x and the pools. Saved for backward: x, v and the pools.
template <class Rows>
struct PoolFunction : torch::autograd::Function<PoolFunction<Rows>> {
  using Context = torch::autograd::AutogradContext;
  using variable_list = torch::autograd::variable_list;

  static Tensor forward(Context* ctx, const Tensor& y, const Tensor& x, at::TensorList factors, const Tensor& ranks,
                        const Tensor& scalings, Rows rows, bool out_first) {
    const size_t slices = factors.size() / 2;
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor v = PoolOps<Rows>::add_recording(y, x, factors.slice(0, slices), factors.slice(slices), ranks,
                                                  scalings, rows, out_first);
    ctx->mark_dirty({y});
    variable_list saved = {x, v, ranks, scalings};
    saved.insert(saved.end(), rows.tensors.begin(), rows.tensors.end());
    saved.insert(saved.end(), factors.begin(), factors.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["out_first"] = out_first;
    return y;
  }

  static variable_list backward(Context* ctx, const variable_list& grad_outputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), Rows::kAdd, ": no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& dy = grad_outputs[0];
    constexpr size_t kFirstRows = 4;
    Rows rows(std::vector<Tensor>(saved.begin() + kFirstRows, saved.begin() + kFirstRows + Rows::kCount));
    const variable_list factors(saved.begin() + kFirstRows + Rows::kCount, saved.end());
    const size_t slices = factors.size() / 2;
    std::vector<bool> need_a, need_b;  // inputs: y, x, then the factors
    for (size_t i = 0; i < slices; ++i) {
      need_a.push_back(ctx->needs_input_grad(2 + i));
      need_b.push_back(ctx->needs_input_grad(2 + slices + i));
    }
    const at::TensorList list(factors);
    const Pools pools{Rows::kAdd,         list.slice(0, slices),
                      list.slice(slices), saved[2],
                      &saved[3],          ctx->saved_data["out_first"].toBool()};
    const SegmentPlan plan = rows.plan(Rows::kAdd, dy, pools.num_slots());
    PoolGradients grads = pools_backward(pools, plan, dy, saved[0], saved[1], ctx->needs_input_grad(1), need_a, need_b);
    variable_list result = {dy, grads.dx};
    result.insert(result.end(), grads.da.begin(), grads.da.end());
    result.insert(result.end(), grads.db.begin(), grads.db.end());
    result.resize(result.size() + 4);  // ranks, scalings, rows, out_first
    return result;
  }
};

template <class Rows>
void pool_add(const Tensor& y, const Tensor& x, at::TensorList a, at::TensorList b, const Tensor& ranks,
              const Tensor& scalings, Rows rows, bool out_first) {
  PoolOps<Rows>::add_recording(y, x, a, b, ranks, scalings, rows, out_first);
}

inline bool any_requires_grad(at::TensorList tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.requires_grad(); });
}

/// Whether tracing sees the tensor, so that it has no memory for a kernel.
inline bool is_traced(const Tensor& t) {
  return t.unsafeGetTensorImpl()->is_python_dispatch() || t.key_set().has(c10::DispatchKey::Functionalize);
}

template <class Rows>
void pool_add_autograd(const Tensor& y, const Tensor& x, at::TensorList a, at::TensorList b, const Tensor& ranks,
                       const Tensor& scalings, Rows rows, bool out_first) {
  if (any_requires_grad({y, x}) || any_requires_grad(a) || any_requires_grad(b)) {
    TORCH_CHECK(!(y.is_leaf() && y.requires_grad()), Rows::kAdd,
                ": y: expected a tensor that is no leaf that requires grad, which cannot be changed in place");
    TORCH_CHECK_NOT_IMPLEMENTED(!is_traced(y) && !is_traced(x), Rows::kAdd,
                                ": no gradients in a traced graph; multi_lora_linear has them");
    std::vector<Tensor> factors(a.begin(), a.end());
    factors.insert(factors.end(), b.begin(), b.end());
    PoolFunction<Rows>::apply(y, x, at::TensorList(factors), ranks, scalings, rows, out_first);
    return;
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    rows.call_add(y, x, a, b, ranks, scalings, out_first);
  }
  if (!y.is_inference()) y.unsafeGetTensorImpl()->bump_version();
}

/// The halves have no derivatives of their own: the whole op has.
inline void refuse_grad(const char* op, at::TensorList tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!any_requires_grad(tensors), op, ": no derivative; the whole op has one");
}

}  // namespace pylora::binding
