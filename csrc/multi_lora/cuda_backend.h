// multi_lora_linear's low-rank part by the launchers of cuda_adapters.h, for op.cpp. Never run on a GPU yet.
#pragma once

#if defined(PYLORA_WITH_CUDA)

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <vector>

#include "binding/segments.h"
#include "multi_lora/cuda_adapters.h"
#include "multi_lora/multi_lora.h"

namespace pylora::multi_lora::on_cuda {

/// The adapters in one dtype, as the kernels take them: f32 holds all that differ.
inline std::vector<Tensor> of_one_dtype(TensorList factors) {
  std::vector<Tensor> result(factors.begin(), factors.end());
  const auto differs = [&](const Tensor& t) { return t.scalar_type() != result[0].scalar_type(); };
  if (std::none_of(result.begin(), result.end(), differs)) return result;
  for (Tensor& factor : result)
    factor = factor.to(at::kFloat);
  return result;
}

inline Batch batch_of(const SegmentShape& shape, const SegmentPlan& plan, const std::vector<SegmentSlot>& adapters,
                      const Tensor& rows) {
  return {shape, plan, adapters.data(), static_cast<int64_t>(adapters.size()), rows.size(0)};
}

/// Adds to y, and writes v.
inline void forward(const Batch& batch, const Tensor& x_rows, const Tensor& y, const Tensor& v) {
  const c10::DeviceGuard guard(y.device());
  const Tensor workspace = binding::workspace_of(forward_workspace_bytes(batch), y);
  ForwardArgs args;
  args.batch = batch;
  args.x = binding::matrix(x_rows);
  args.y = {y.mutable_data_ptr(), batch.shape.out_features, 1};
  args.v = v.mutable_data_ptr();
  args.workspace = workspace.mutable_data_ptr();
  binding::throw_unless_ok(forward_cuda(binding::device_context(y.device()), args));
}

struct FactorGradients {
  std::vector<Tensor> da, db;
};

/// Adds to dx, if it is defined; the factors' gradients, or none.
inline FactorGradients backward(const Batch& batch, const Tensor& dy_rows, const Tensor& x_rows, const Tensor& v,
                                const Tensor& dx, TensorList a, TensorList b, bool need_factors) {
  const c10::DeviceGuard guard(dy_rows.device());
  FactorGradients grads;
  std::vector<void*> da, db;
  for (size_t i = 0; need_factors && i < a.size(); ++i) {
    grads.da.push_back(at::empty_like(a[i], a[i].options(), at::MemoryFormat::Contiguous));
    grads.db.push_back(at::empty_like(b[i], b[i].options(), at::MemoryFormat::Contiguous));
    da.push_back(grads.da.back().mutable_data_ptr());
    db.push_back(grads.db.back().mutable_data_ptr());
  }
  const Tensor workspace = binding::workspace_of(backward_workspace_bytes(batch), dy_rows);
  BackwardArgs args;
  args.batch = batch;
  args.dy = binding::matrix(dy_rows);
  args.x = binding::matrix(x_rows);
  args.v = v.const_data_ptr();
  if (dx.defined()) args.dx = {dx.mutable_data_ptr(), batch.shape.in_features, 1};
  args.da = need_factors ? da.data() : nullptr;
  args.db = need_factors ? db.data() : nullptr;
  args.workspace = workspace.mutable_data_ptr();
  binding::throw_unless_ok(backward_cuda(binding::device_context(dy_rows.device()), args));
  return grads;
}

/// Adds to y. columns: int64, one for each token.
inline void embedding(const Batch& batch, const Tensor& columns, const Tensor& y) {
  const c10::DeviceGuard guard(y.device());
  const Tensor workspace = binding::workspace_of(embedding_workspace_bytes(batch), y);
  EmbeddingArgs args;
  args.batch = batch;
  args.columns = columns.const_data_ptr<int64_t>();
  args.y = {y.mutable_data_ptr(), batch.shape.out_features, 1};
  args.workspace = workspace.mutable_data_ptr();
  binding::throw_unless_ok(embedding_forward_cuda(binding::device_context(y.device()), args));
}

inline FactorGradients embedding_backward(const Batch& batch, const Tensor& columns, int64_t frozen_column,
                                          const Tensor& dy_rows, TensorList a, TensorList b) {
  const c10::DeviceGuard guard(dy_rows.device());
  FactorGradients grads;
  std::vector<void*> da, db;
  for (size_t i = 0; i < a.size(); ++i) {
    grads.da.push_back(at::zeros(a[i].sizes(), a[i].options()));
    grads.db.push_back(at::empty(b[i].sizes(), b[i].options()));
    da.push_back(grads.da.back().mutable_data_ptr());
    db.push_back(grads.db.back().mutable_data_ptr());
  }
  const Tensor workspace = binding::workspace_of(embedding_workspace_bytes(batch), dy_rows);
  EmbeddingArgs args;
  args.batch = batch;
  args.columns = columns.const_data_ptr<int64_t>();
  args.frozen_column = frozen_column;
  args.dy = binding::matrix(dy_rows);
  args.da = da.data();
  args.db = db.data();
  args.workspace = workspace.mutable_data_ptr();
  binding::throw_unless_ok(embedding_backward_cuda(binding::device_context(dy_rows.device()), args));
  return grads;
}

}  // namespace pylora::multi_lora::on_cuda

#endif  // PYLORA_WITH_CUDA
