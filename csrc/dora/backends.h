// The implementations of dora's own part, behind one shape: Kernels (dora.h's launchers, on the CPU or on CUDA) and Aten
// (any other device). Norms come as f64 [out_features]; z, rest and y as rows.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <type_traits>

#include "binding/context.h"
#include "binding/dense.h"
#include "binding/status.h"
#include "dora/aten.h"
#include "dora/heuristics.h"

namespace pylora::dora {

struct OnCpu {
  static constexpr bool kStacks = true;

  static Tensor norms_workspace(const NormsArgs& args, const Tensor& like) {
    return binding::workspace_of(norms_workspace_bytes(args), like);
  }
  static Tensor scale_workspace(const ScaleBackwardArgs&, const Tensor& like) { return binding::workspace_of(0, like); }

  static Status squares(const Tensor&, const SquaresArgs& args) { return squares_cpu(binding::cpu_context(), args); }
  static Status norms(const Tensor&, const NormsArgs& args) { return norms_cpu(binding::cpu_context(), args); }
  static Status norms_from_cross(const Tensor&, const CrossArgs& args) {
    return norms_from_cross_cpu(binding::cpu_context(), args);
  }
  static Status scale(const Tensor&, const ScaleArgs& args) { return scale_cpu(binding::cpu_context(), args); }
  static Status scale_backward(const Tensor&, const ScaleBackwardArgs& args) {
    return scale_backward_cpu(binding::cpu_context(), args);
  }
};

#if defined(PYLORA_WITH_CUDA)
/// Never run on a GPU yet. The tensor given says which.
struct OnCuda {
  static constexpr bool kStacks = false;  // torch's product keeps no f32 sums of 16-bit weights, and W is cheap to read

  static Tensor norms_workspace(const NormsArgs& args, const Tensor& like) {
    return counted(norms_workspace_bytes_cuda(args), norms_counter_bytes_cuda(args), like);
  }
  static Tensor scale_workspace(const ScaleBackwardArgs& args, const Tensor& like) {
    return counted(scale_backward_workspace_bytes_cuda(args), scale_counter_bytes_cuda(args), like);
  }

  static Status squares(const Tensor& on, const SquaresArgs& args) { return run(squares_cuda, on, args); }
  static Status norms(const Tensor& on, const NormsArgs& args) { return run(norms_cuda, on, args); }
  static Status norms_from_cross(const Tensor& on, const CrossArgs& args) { return run(norms_cuda, on, args.norms); }
  static Status scale(const Tensor& on, const ScaleArgs& args) { return run(scale_cuda, on, args); }
  static Status scale_backward(const Tensor& on, const ScaleBackwardArgs& args) {
    return run(scale_backward_cuda, on, args);
  }

 private:
  template <class Args>
  static Status run(Status (*launch)(const Context&, const Args&), const Tensor& on, const Args& args) {
    const c10::DeviceGuard guard(on.device());
    return launch(binding::device_context(on.device()), args);
  }

  static Tensor counted(int64_t bytes, int64_t counter_bytes, const Tensor& like) {
    const Tensor workspace = binding::workspace_of(bytes, like);
    workspace.narrow(0, 0, counter_bytes).zero_();
    return workspace;
  }
};
#endif

/// What the launch keeps alive beside its arguments.
template <class Where>
struct NormsLaunch {
  NormsArgs args;
  Tensor norms, workspace;

  NormsLaunch(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling) {
    args.out_features = weight.size(0);
    args.in_features = weight.size(1);
    args.rank = a.size(0);
    args.dtype = binding::to_dtype(weight.scalar_type());
    args.factor_dtype = binding::to_dtype(a.scalar_type());
    args.scaling = scaling;
    args.weight = binding::matrix(weight);
    args.a = binding::matrix(a);
    args.b = binding::matrix(b);
    norms = at::empty({args.out_features}, weight.options().dtype(at::kDouble));
    workspace = Where::norms_workspace(args, weight);
    args.norms = norms.mutable_data_ptr<double>();
    args.workspace = workspace.mutable_data_ptr();
  }
};

template <class Where>
struct KernelBackend {
  /// Whether W A^T is taken from a product that has A's rows below x's. It pays while A is small beside what packing W
  /// costs; a second pass over W is as fast for larger ranks, and saves the copy of many rows of x. Sums rounded to 16
  /// bits would be too coarse.
  static bool stacks(const Tensor& x, const Tensor& a) {
    const bool wide = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
    return Where::kStacks && wide && x.size(0) > 0 && x.size(0) <= kStackedRows && a.size(0) <= kStackedRank;
  }

  static Tensor dense(const Tensor& x, const Tensor& weight) { return binding::dense_product(x, weight, std::nullopt); }

  static Tensor row_squares(const Tensor& weight) {
    const Tensor squares = at::empty({weight.size(0)}, weight.options().dtype(at::kDouble));
    SquaresArgs args{weight.size(0), weight.size(1), binding::to_dtype(weight.scalar_type()), binding::matrix(weight),
                     squares.mutable_data_ptr<double>()};
    binding::throw_unless_ok(Where::squares(weight, args));
    return squares;
  }

  static Tensor row_norms(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling) {
    const NormsLaunch<Where> launch(weight, a, b, scaling);
    binding::throw_unless_ok(Where::norms(weight, launch.args));
    return launch.norms;
  }

  /// cross: A W^T, [rank, out].
  static Tensor row_norms_from(const Tensor& cross, const Tensor& squares, const Tensor& weight, const Tensor& a,
                               const Tensor& b, double scaling) {
    const NormsLaunch<Where> launch(weight, a, b, scaling);
    const CrossArgs args{launch.args, binding::matrix(cross), squares.const_data_ptr<double>()};
    binding::throw_unless_ok(Where::norms_from_cross(weight, args));
    return launch.norms;
  }

  /// The whole layer in one pass over W, if that is the way for this product; without dropout.
  static OptionalTensor one_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a,
                                    const Tensor& b, const Tensor& magnitude, const Tensor& norms, double scaling) {
    if constexpr (!std::is_same_v<Where, OnCpu>) return std::nullopt;
    const binding::TokenRows rows(x);
    if (!binding::takes_adapter(binding::product_args(rows, weight), b)) return std::nullopt;
    const Tensor magnitudes = magnitude.contiguous();
    const Tensor factor = binding::new_on_cpu({weight.size(0)}, binding::accumulator_type(x.scalar_type()));
    const FactorArgs args{weight.size(0),
                          binding::to_dtype(x.scalar_type()),
                          binding::to_dtype(magnitude.scalar_type()),
                          magnitudes.const_data_ptr(),
                          norms.const_data_ptr<double>(),
                          factor.mutable_data_ptr()};
    binding::throw_unless_ok(factor_cpu(args));
    return lora::linear_scaled(x, weight, bias, a, b, factor, scaling);
  }

  /// y takes z's memory if in_place.
  static Tensor scale(const Tensor& z, const OptionalTensor& rest, const Tensor& magnitude, const Tensor& norms,
                      const OptionalTensor& bias, bool in_place) {
    const Tensor bias_run = bias ? bias->contiguous() : Tensor();
    const Tensor magnitudes = magnitude.contiguous();
    const Tensor y = in_place ? z : at::empty_like(z);
    ScaleArgs args;
    args.num_tokens = z.size(0);
    args.out_features = z.size(1);
    args.dtype = binding::to_dtype(z.scalar_type());
    args.magnitude_dtype = binding::to_dtype(magnitude.scalar_type());
    args.magnitude = magnitudes.const_data_ptr();
    args.norms = norms.const_data_ptr<double>();
    args.z = binding::matrix(z);
    if (rest) args.rest = binding::matrix(*rest);
    args.bias = bias ? bias_run.const_data_ptr() : nullptr;
    args.y = {y.mutable_data_ptr(), y.stride(0), 1};
    binding::throw_unless_ok(Where::scale(z, args));
    return y;
  }

  static std::tuple<Tensor, Tensor> scale_backward(const Tensor& dy, const OptionalTensor& z, const Tensor& magnitude,
                                                   const Tensor& norms, bool need_dz) {
    const Tensor rows = binding::with_unit_columns(dy), magnitudes = magnitude.contiguous();
    Tensor dz, dmagnitude;
    ScaleBackwardArgs args;
    args.num_tokens = dy.size(0);
    args.out_features = dy.size(1);
    args.dtype = binding::to_dtype(dy.scalar_type());
    args.magnitude_dtype = binding::to_dtype(magnitude.scalar_type());
    args.magnitude = magnitudes.const_data_ptr();
    args.norms = norms.const_data_ptr<double>();
    args.dy = {rows.const_data_ptr(), rows.stride(0), 1};
    if (need_dz) {
      dz = at::empty(dy.sizes(), dy.options());
      args.dz = {dz.mutable_data_ptr(), args.out_features, 1};
    }
    if (z) {
      args.z = binding::matrix(*z);
      dmagnitude = at::empty({args.out_features}, dy.options().dtype(binding::accumulator_type(dy.scalar_type())));
      args.dmagnitude = dmagnitude.mutable_data_ptr();
    }
    const Tensor workspace = Where::scale_workspace(args, dy);
    args.workspace = workspace.mutable_data_ptr();
    binding::throw_unless_ok(Where::scale_backward(dy, args));
    return {dz, dmagnitude};
  }
};

struct AtenBackend {
  static bool stacks(const Tensor&, const Tensor&) { return false; }
  static Tensor dense(const Tensor& x, const Tensor& weight) { return at::linear(x, weight); }
  static Tensor row_squares(const Tensor& weight) { return aten::row_squares(weight); }
  static Tensor row_norms(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling) {
    return aten::row_norms(weight, a, b, scaling);
  }
  static Tensor row_norms_from(const Tensor&, const Tensor&, const Tensor& weight, const Tensor& a, const Tensor& b,
                               double scaling) {
    return aten::row_norms(weight, a, b, scaling);
  }
  static OptionalTensor one_product(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                    const Tensor&, const Tensor&, double) {
    return std::nullopt;
  }
  static Tensor scale(const Tensor& z, const OptionalTensor& rest, const Tensor& magnitude, const Tensor& norms,
                      const OptionalTensor& bias, bool) {
    return aten::scale(z, rest, magnitude, norms, bias);
  }
  static std::tuple<Tensor, Tensor> scale_backward(const Tensor& dy, const OptionalTensor& z, const Tensor& magnitude,
                                                   const Tensor& norms, bool need_dz) {
    return aten::scale_backward(dy, z, magnitude, norms, need_dz);
  }
};

}  // namespace pylora::dora
