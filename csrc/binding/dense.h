// A dense product on the CPU by whichever of pylora's kernels and torch's own is better for the shape and dtype.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/CPUAllocator.h>

#include <optional>

#include "binding/context.h"
#include "binding/dtype.h"
#include "binding/status.h"
#include "binding/tensors.h"
#include "cpu/gemm.h"

namespace pylora::binding {

inline ConstMatrix matrix(const at::Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

inline at::Tensor workspace_of(int64_t bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

/// Memory for a launcher's workspace on the CPU: the allocator aligns to 64. A tensor costs 1 us more, a hundredth of a
/// decode call.
class CpuWorkspace {
 public:
  explicit CpuWorkspace(int64_t bytes) {
    if (bytes > 0) memory_ = c10::GetCPUAllocator()->allocate(static_cast<size_t>(bytes));
  }
  void* data() const { return memory_.get(); }

 private:
  at::DataPtr memory_;
};

/// at::empty for the CPU without the way through the dispatcher.
inline at::Tensor new_on_cpu(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::Tensor(at::detail::empty_cpu(sizes, at::TensorOptions().dtype(dtype)));
}

/// Neighbouring columns side by side in memory, as kernels take rows: a copy only where the strides allow nothing
/// else.
inline at::Tensor with_unit_columns(const at::Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous();
}

/// Tokens as rows with unit columns, as kernels take them: where they lie, or a copy where the strides allow nothing else.
struct TokenRows {
  at::Tensor held;
  int64_t count, width;
  ConstMatrix matrix;

  explicit TokenRows(const at::Tensor& t) : held(t), count(1), width(t.size(-1)) {
    if (!t.is_contiguous()) held = with_unit_columns(flat_rows(t));
    for (int64_t i = 0; i + 1 < t.dim(); ++i)
      count *= t.size(i);
    matrix = {held.const_data_ptr(), held.is_contiguous() ? width : held.stride(0), 1};
  }
};

/// x w^T as a launcher takes it, without y: w [columns, depth], of x's dtype.
inline GemmArgs product_args(const TokenRows& x, const at::Tensor& w) {
  GemmArgs args;
  args.rows = x.count;
  args.columns = w.size(0);
  args.depth = x.width;
  args.dtype = to_dtype(w.scalar_type());
  args.x = x.matrix;
  args.w = matrix(w);
  return args;
}

/// Whether an adapter's low-rank product is best made in the same pass as this one.
inline bool takes_adapter(const GemmArgs& product, const at::Tensor& b) {
  return gemm_is_better(product) && b.stride(1) == 1 &&
         gemm_takes_low_rank(product, b.size(1), to_dtype(b.scalar_type()));
}

/// The product as a new contiguous tensor with x's leading dimensions, by pylora's own kernels.
inline at::Tensor run_product(GemmArgs args, const std::optional<at::Tensor>& bias, const at::Tensor& x) {
  c10::SmallVector<int64_t, 4> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = args.columns;
  const at::Tensor y = new_on_cpu(shape, x.scalar_type());
  const CpuWorkspace workspace(gemm_workspace_bytes(args));
  at::Tensor bias_run;
  if (bias) bias_run = bias->contiguous();
  args.bias = bias ? bias_run.const_data_ptr() : nullptr;
  args.y = {y.mutable_data_ptr(), args.columns, 1};
  args.workspace = workspace.data();
  throw_unless_ok(gemm_cpu(cpu_context(), args));
  return y;
}

/// x w^T + bias, contiguous: x [rows, depth], w [columns, depth] with any strides, all of one dtype. On other devices
/// than the CPU torch's.
inline at::Tensor dense_product(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  if (!x.is_cpu()) return at::linear(x, w, bias).contiguous();
  const TokenRows rows(x);
  const GemmArgs args = product_args(rows, w);
  return gemm_is_better(args) ? run_product(args, bias, x) : at::linear(x, w, bias).contiguous();
}

}  // namespace pylora::binding
