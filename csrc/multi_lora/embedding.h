// multi_lora_embedding_: adds each row's adapter to an embedding's output. A is looked up where the embedding looks up
// its weight. Included by op.cpp alone.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "binding/pool_ops.h"
#include "multi_lora/adapters.h"
#include "multi_lora/cuda_backend.h"

namespace pylora::multi_lora {

constexpr const char* kEmbedding = "multi_lora_embedding_";

/// The checked arguments of both directions; `like` is y or its gradient, [rows, ..., out].
struct EmbeddingCall {
  Tensor columns;  // int64, contiguous, one for each token
  std::vector<SegmentSlot> adapters;
  SegmentPlan plan;
  SegmentShape shape;

  EmbeddingCall(const Tensor& like, const Tensor& tokens, PYLORA_SERVED_ARGS) {
    const binding::Checks check(kEmbedding);
    check.dim_at_least("y", like, 1);
    TORCH_CHECK_TYPE(tokens.scalar_type() == at::kLong || tokens.scalar_type() == at::kInt, kEmbedding,
                     ": tokens: expected int64 or int32, got ", tokens.scalar_type());
    check.shape("tokens", tokens, like.sizes().slice(0, static_cast<size_t>(like.dim() - 1)));
    check.same_device("tokens", tokens, "y", like);
    const int64_t num_embeddings = a.empty() || a[0].dim() != 2 ? -1 : a[0].size(1), out = like.size(-1);
    adapters = check_adapters(kEmbedding, "y", like, num_embeddings, out, a, b, scalings, {}, std::nullopt);
    plan = check_plan(kEmbedding, "y", like, tokens.numel(), static_cast<int64_t>(a.size()), order, indptr, slots);
    shape = {num_embeddings, out, largest_rank(adapters), binding::to_dtype(like.scalar_type())};
    columns = tokens.to(at::kLong).contiguous();
    const Tensor checked = binding::values_to_check(columns);
    if (!checked.defined() || plan.on_device) return;  // the kernels pass over tokens that there are not
    const int64_t* column = checked.const_data_ptr<int64_t>();
    for (int64_t s = 0; s < plan.num_segments; ++s) {
      for (int64_t p = plan.begin_of(s); plan.slots[s] >= 0 && p < plan.begin_of(s + 1); ++p) {
        const int64_t found = column[plan.token(p)];
        TORCH_CHECK_INDEX(found >= 0 && found < num_embeddings, kEmbedding, ": tokens: expected numbers from 0 to ",
                          num_embeddings - 1, ", got ", found);
      }
    }
  }

  OneHot one_hot(int64_t frozen_column) const { return {columns.const_data_ptr<int64_t>(), frozen_column}; }

  Tensor new_v(const Tensor& like) const {
    return at::empty({columns.numel(), shape.v_stride},
                     like.options().dtype(binding::accumulator_type(like.scalar_type())));
  }
};

inline void embedding(const Tensor& y, const Tensor& tokens, PYLORA_SERVED_ARGS, int64_t) {
  const EmbeddingCall call(y, tokens, PYLORA_SERVED_NAMES);
  TORCH_CHECK_VALUE(y.is_contiguous(), kEmbedding, ": y: expected a contiguous tensor, got strides ", y.strides());
#if defined(PYLORA_WITH_CUDA)
  if (!y.is_cpu()) {
    const auto batch = on_cuda::batch_of(call.shape, call.plan, call.adapters, call.columns);
    return on_cuda::embedding(batch, call.columns, y);
  }
#endif
  const Tensor v = call.new_v(y);
  SegmentForward args;
  args.shape = call.shape;
  args.plan = call.plan;
  args.slots = call.adapters.data();
  args.one_hot = call.one_hot(-1);
  args.v = v.mutable_data_ptr();
  args.y = {y.mutable_data_ptr(), call.shape.out_features, 1};
  binding::throw_unless_ok(segments_forward_cpu(binding::cpu_context(), args));
}

/// Gradients of all factors. Those of A's column `padding_idx` are zero.
inline FactorGradients embedding_backward(const Tensor& dy, const Tensor& tokens, PYLORA_SERVED_ARGS,
                                          int64_t padding_idx) {
  const EmbeddingCall call(dy, tokens, PYLORA_SERVED_NAMES);
#if defined(PYLORA_WITH_CUDA)
  if (!dy.is_cpu()) {
    const Tensor rows = binding::with_unit_columns(binding::flat_rows(dy));
    const auto batch = on_cuda::batch_of(call.shape, call.plan, call.adapters, rows);
    on_cuda::FactorGradients grads = on_cuda::embedding_backward(batch, call.columns, padding_idx, rows, a, b);
    return {std::move(grads.da), std::move(grads.db)};
  }
#endif
  const Tensor v = call.new_v(dy), g = at::empty_like(v), dy_rows = binding::with_unit_columns(binding::flat_rows(dy));
  FactorSums sums(a, b, v.options());
  SegmentForward again;  // a look-up is cheaper than keeping what it gave
  again.shape = call.shape;
  again.plan = call.plan;
  again.slots = call.adapters.data();
  again.one_hot = call.one_hot(-1);
  again.v = v.mutable_data_ptr();
  binding::throw_unless_ok(segments_shrink_cpu(binding::cpu_context(), again));
  SegmentBackward args;
  args.shape = call.shape;
  args.plan = call.plan;
  args.slots = call.adapters.data();
  args.one_hot = call.one_hot(padding_idx);
  args.dy = binding::matrix(dy_rows);
  args.v = v.const_data_ptr();
  args.g = g.mutable_data_ptr();
  args.da = sums.da_pointers.data();
  args.db = sums.db_pointers.data();
  binding::throw_unless_ok(segments_backward_cpu(binding::cpu_context(), args));
  return sums.as_gradients(a, b);
}

/// Saved for backward: tokens and the factors.
struct EmbeddingFunction : torch::autograd::Function<EmbeddingFunction> {
  using Context = torch::autograd::AutogradContext;

  static Tensor forward(Context* ctx, const Tensor& y, TensorList factors, const Tensor& tokens,
                        std::vector<double> scalings, variable_list plan, int64_t padding_idx) {
    const size_t count = factors.size() / 2;
    variable_list saved = {tokens};
    saved.insert(saved.end(), plan.begin(), plan.end());
    saved.insert(saved.end(), factors.begin(), factors.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["scalings"] = scalings;
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->mark_dirty({y});
    const at::AutoDispatchBelowADInplaceOrView below;
    call_embedding(y, tokens, factors.slice(0, count), factors.slice(count), scalings, plan[0], plan[1], plan[2],
                   padding_idx);
    return y;
  }

  static variable_list backward(Context* ctx, const variable_list& grad_outputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), kEmbedding, ": no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const TensorList factors = TensorList(saved).slice(4);
    const size_t count = factors.size() / 2;
    variable_list result = {grad_outputs[0]};
    result.resize(1 + factors.size() + 4);  // after the factors: tokens, scalings, plan, padding_idx
    const auto [da, db] = call_embedding_backward(grad_outputs[0], saved[0], factors.slice(0, count),
                                                  factors.slice(count), ctx->saved_data["scalings"].toDoubleVector(),
                                                  saved[1], saved[2], saved[3], ctx->saved_data["padding_idx"].toInt());
    for (size_t i = 0; i < factors.size(); ++i)
      if (ctx->needs_input_grad(1 + i)) result[1 + i] = i < count ? da[i] : db[i - count];
    return result;
  }
};

inline void embedding_autograd(const Tensor& y, const Tensor& tokens, PYLORA_SERVED_ARGS, int64_t padding_idx) {
  check_in_place(kEmbedding, y);
  if (binding::any_requires_grad(a) || binding::any_requires_grad(b)) {
    TORCH_CHECK_NOT_IMPLEMENTED(!binding::is_traced(y), kEmbedding, ": no gradients in a traced graph");
    const std::vector<Tensor> factors = factors_of(a, b);
    EmbeddingFunction::apply(y, TensorList(factors), tokens, scalings.vec(), variable_list{order, indptr, slots},
                             padding_idx);
    return;
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_embedding(y, tokens, PYLORA_SERVED_NAMES, padding_idx);
  }
  if (!y.is_inference()) y.unsafeGetTensorImpl()->bump_version();
}

}  // namespace pylora::multi_lora
