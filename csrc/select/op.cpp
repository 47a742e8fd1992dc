// pylora::keep_largest: schema, checks, registration. Without derivatives.
#include <ATen/core/Tensor.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "binding/checks.h"
#include "binding/context.h"
#include "binding/status.h"
#include "select/select.h"

namespace pylora::select {
namespace {

using at::Tensor;

void check(const Tensor& x, int64_t count) {
  binding::Checks("keep_largest").kernel_dtype("x", x);
  TORCH_CHECK_VALUE(0 <= count && count <= x.numel(), "keep_largest: count: expected 0 to the size of x, ", x.numel(),
                    ", got ", count);
}

/// By torch.topk: on other devices, and where its choice among equal magnitudes shows in the result.
Tensor by_topk(const Tensor& x, int64_t count) {
  check(x, count);
  const Tensor out = at::zeros_like(x, x.options(), at::MemoryFormat::Contiguous), flat = x.reshape({-1});
  const Tensor kept = std::get<1>(flat.abs().topk(count, 0, true, true));
  out.view({-1}).index_copy_(0, kept, flat.index_select(0, kept));
  return out;
}

uint64_t infinity_bits(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return 0x7ff0000000000000;
    case at::kFloat:
      return 0x7f800000;
    case at::kHalf:
      return 0x7c00;
    default:
      return 0x7f80;
  }
}

Tensor by_histogram(const Tensor& x, int64_t count) {
  check(x, count);
  if (count == 0) return at::zeros_like(x, x.options(), at::MemoryFormat::Contiguous);
  const Tensor values = x.contiguous();
  ThresholdArgs args;
  args.size = x.numel();
  args.dtype = binding::to_dtype(x.scalar_type());
  args.x = values.const_data_ptr();
  args.count = count;
  const Tensor workspace = at::empty({threshold_workspace_bytes(args.size, args.dtype)}, x.options().dtype(at::kByte));
  args.workspace = workspace.mutable_data_ptr();
  const Context context = binding::cpu_context();
  Threshold found;
  binding::throw_unless_ok(magnitude_threshold_cpu(context, args, &found));
  const bool any_of_equals = found.larger + found.equal > count && found.bits != 0;
  if (any_of_equals || found.bits > infinity_bits(x.scalar_type())) return by_topk(x, count);
  const Tensor out = at::empty_like(x, x.options(), at::MemoryFormat::Contiguous);
  binding::throw_unless_ok(keep_from_cpu(context, args.size, args.dtype, args.x, found.bits, out.mutable_data_ptr()));
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  m.def("keep_largest(Tensor x, int count) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) { m.impl("keep_largest", &by_histogram); }

TORCH_LIBRARY_IMPL(pylora, CompositeExplicitAutograd, m) { m.impl("keep_largest", &by_topk); }

}  // namespace pylora::select
