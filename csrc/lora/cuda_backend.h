// The delta by the kernels of csrc/lora/lora.cu, for op.cpp; the base product is torch's. Never run on a GPU yet.
#pragma once

#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "lora/backends.h"

namespace pylora::lora {

struct CudaBackend {
  static Tensor dense(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    return aten::dense(x, weight, bias);
  }

  static std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                           const Tensor& a, const Tensor& b, double scaling, double dropout_p,
                                           const OptionalTensor& rng) {
    const Tensor base = dense(aten::rows(x), weight, bias).view(aten::with_width(x, weight.size(0)));
    return forward(base, x, a, b, scaling, dropout_p, rng);
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                            double scaling, double dropout_p, const OptionalTensor& rng) {
    const c10::DeviceGuard guard(x.device());
    const Tensor x_rows = token_rows(x);
    ForwardArgs args;
    args.shape = shape_of(x_rows.size(0), x.scalar_type(), a, b);
    const Tensor v = at::empty({args.shape.num_tokens, args.shape.rank},
                               x.options().dtype(binding::accumulator_type(x.scalar_type())));
    const Tensor workspace = counted_workspace(forward_workspace_bytes_cuda(args.shape), args.shape, x);
    args.scaling = scaling;
    args.dropout = dropout_of(dropout_p, rng);
    args.x = matrix(x_rows);
    args.a = matrix(a);
    args.b = matrix(b);
    args.y = {y.mutable_data_ptr(), args.shape.out_features, 1};
    args.v = v.mutable_data_ptr();
    args.workspace = workspace.mutable_data_ptr();
    binding::throw_unless_ok(forward_cuda(binding::device_context(x.device()), args));
    return {y, v};
  }

  static aten::Gradients backward(const Tensor& dx, const Tensor& dy, const OptionalTensor& x, const Tensor& a,
                                  const Tensor& b, const OptionalTensor& v, double scaling, double dropout_p,
                                  const OptionalTensor& rng, DeltaNeeds needs) {
    const c10::DeviceGuard guard(dy.device());
    const Tensor dy_rows = token_rows(dy), x_rows = needs.da ? token_rows(*x) : Tensor();
    BackwardArgs args;
    args.shape = shape_of(dy_rows.size(0), dy.scalar_type(), a, b);
    aten::Gradients grads;
    if (needs.dx) {
      TORCH_INTERNAL_ASSERT(dx.scalar_type() == dy.scalar_type() && dx.is_contiguous());
      grads.dx = dx;
      args.dx = {dx.mutable_data_ptr(), args.shape.in_features, 1};
    }
    if (needs.da) {
      grads.da = at::empty(a.sizes(), a.options());
      args.da = grads.da.mutable_data_ptr();
      args.x = matrix(x_rows);
    }
    if (needs.db) {
      grads.db = at::empty(b.sizes(), b.options());
      args.db = grads.db.mutable_data_ptr();
      args.v = v->const_data_ptr();
    }
    const Tensor workspace = counted_workspace(backward_workspace_bytes_cuda(args.shape), args.shape, dy);
    args.scaling = scaling;
    args.dropout = dropout_of(dropout_p, rng);
    args.dy = matrix(dy_rows);
    args.a = matrix(a);
    args.b = matrix(b);
    args.workspace = workspace.mutable_data_ptr();
    binding::throw_unless_ok(backward_cuda(binding::device_context(dy.device()), args));
    return grads;
  }

 private:
  /// Counters first, and those zero.
  static Tensor counted_workspace(int64_t bytes, const Shape& shape, const Tensor& like) {
    const Tensor result = workspace_of(bytes, like);
    result.narrow(0, 0, counter_bytes_cuda(shape)).zero_();
    return result;
  }
};

}  // namespace pylora::lora
