// A dense product on the CPU by whichever of pylora's kernels and torch's own is better for the shape and dtype.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <optional>

#include "binding/context.h"
#include "binding/dtype.h"
#include "binding/status.h"
#include "cpu/gemm.h"

namespace pylora::binding {

inline ConstMatrix matrix(const at::Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

inline at::Tensor workspace_of(int64_t bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

/// Neighbouring columns side by side in memory, as kernels take rows: a copy only where the strides allow nothing
/// else.
inline at::Tensor with_unit_columns(const at::Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous();
}

/// x w^T + bias, contiguous: x [rows, depth], w [columns, depth] with any strides, all of one dtype.
inline at::Tensor dense_product(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  const at::Tensor rows = with_unit_columns(x);
  GemmArgs args;
  args.rows = x.size(0);
  args.columns = w.size(0);
  args.depth = x.size(1);
  args.dtype = to_dtype(x.scalar_type());
  args.x = {rows.const_data_ptr(), rows.stride(0), 1};
  args.w = matrix(w);
  if (!gemm_is_better(args)) return at::linear(x, w, bias).contiguous();
  const std::optional<at::Tensor> bias_run = bias ? std::optional(bias->contiguous()) : bias;
  const at::Tensor y = at::empty({args.rows, args.columns}, x.options());
  const at::Tensor workspace = workspace_of(gemm_workspace_bytes(args), x);
  args.bias = bias_run ? bias_run->const_data_ptr() : nullptr;
  args.y = {y.mutable_data_ptr(), args.columns, 1};
  args.workspace = workspace.mutable_data_ptr();
  throw_unless_ok(gemm_cpu(cpu_context(), args));
  return y;
}

}  // namespace pylora::binding
