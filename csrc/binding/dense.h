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

/// x w^T as a launcher takes it, without y: x [rows, depth] with unit columns, w [columns, depth], of one dtype.
inline GemmArgs product_args(const at::Tensor& x, const at::Tensor& w) {
  GemmArgs args;
  args.rows = x.size(0);
  args.columns = w.size(0);
  args.depth = x.size(1);
  args.dtype = to_dtype(x.scalar_type());
  args.x = {x.const_data_ptr(), x.stride(0), 1};
  args.w = matrix(w);
  return args;
}

/// The product as a new contiguous tensor, by pylora's own kernels.
inline at::Tensor run_product(GemmArgs args, const std::optional<at::Tensor>& bias, const at::Tensor& like) {
  const at::Tensor y = at::empty({args.rows, args.columns}, like.options());
  const int64_t bytes = gemm_workspace_bytes(args);
  const at::Tensor workspace = bytes > 0 ? workspace_of(bytes, like) : at::Tensor();
  at::Tensor bias_run;
  if (bias) bias_run = bias->contiguous();
  args.bias = bias ? bias_run.const_data_ptr() : nullptr;
  args.y = {y.mutable_data_ptr(), args.columns, 1};
  args.workspace = bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
  throw_unless_ok(gemm_cpu(cpu_context(), args));
  return y;
}

/// x w^T + bias, contiguous: x [rows, depth], w [columns, depth] with any strides, all of one dtype.
inline at::Tensor dense_product(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  const at::Tensor rows = with_unit_columns(x);
  const GemmArgs args = product_args(rows, w);
  return gemm_is_better(args) ? run_product(args, bias, x) : at::linear(x, w, bias).contiguous();
}

}  // namespace pylora::binding
