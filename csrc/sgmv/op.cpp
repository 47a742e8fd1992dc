// pylora::sgmv_, sgmv_shrink and sgmv_expand_: tokens come in segments, one adapter a segment.
#include <torch/library.h>

#include "binding/pool_ops.h"
#include "sgmv/call.h"

namespace pylora::sgmv {
namespace {

/// segment_indptr and segment_slots.
struct Rows {
  static constexpr const char *kAdd = "sgmv_", *kShrink = "sgmv_shrink", *kExpand = "sgmv_expand_";
  static constexpr size_t kCount = 2;

  explicit Rows(std::vector<Tensor> given) : tensors(std::move(given)) {}

  SegmentPlan plan(const char* op, const Tensor& like, int64_t num_slots) const {
    const Tensor &indptr = tensors[0], &slots = tensors[1];
    binding::check_indices(op, "segment_slots", slots, -1, like);
    binding::check_indptr(op, "segment_indptr", indptr, slots.size(0), like.size(0), like);
    binding::Checks(op).same_device("segment_slots", slots, "segment_indptr", indptr);
    binding::check_slots(op, "segment_slots", slots, num_slots);
    SegmentPlan plan;
    plan.num_segments = slots.size(0);
    plan.indptr = indptr.const_data_ptr<int32_t>();
    plan.slots = slots.const_data_ptr<int32_t>();
    plan.on_device = !slots.is_cpu();
    return plan;
  }

  void call_add(const Tensor& y, const Tensor& x, TensorList a, TensorList b, const Tensor& ranks,
                const Tensor& scalings, bool out_first) const {
    sgmv::call_add(y, x, a, b, ranks, scalings, tensors[0], tensors[1], out_first);
  }

  std::vector<Tensor> tensors;
};

using Ops = binding::PoolOps<Rows>;

template <void (*body)(const Tensor&, const Tensor&, TensorList, TensorList, const Tensor&, const Tensor&, Rows, bool)>
void add(const Tensor& y, const Tensor& x, TensorList a, TensorList b, const Tensor& ranks, const Tensor& scalings,
         const Tensor& indptr, const Tensor& slots, bool out_first) {
  body(y, x, a, b, ranks, scalings, Rows({indptr, slots}), out_first);
}

Tensor shrink(const Tensor& x, TensorList a, const Tensor& ranks, const Tensor& indptr, const Tensor& slots) {
  return Ops::shrink(x, a, ranks, Rows({indptr, slots}));
}

void expand(const Tensor& y, const Tensor& v, TensorList b, const Tensor& ranks, const Tensor& scalings,
            const Tensor& indptr, const Tensor& slots, bool out_first) {
  Ops::expand(y, v, b, ranks, scalings, Rows({indptr, slots}), out_first);
}

Tensor shrink_autograd(const Tensor& x, TensorList a, const Tensor& ranks, const Tensor& indptr, const Tensor& slots) {
  binding::refuse_grad(Rows::kShrink, {x});
  binding::refuse_grad(Rows::kShrink, a);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_shrink(x, a, ranks, indptr, slots);
}

void expand_autograd(const Tensor& y, const Tensor& v, TensorList b, const Tensor& ranks, const Tensor& scalings,
                     const Tensor& indptr, const Tensor& slots, bool out_first) {
  binding::refuse_grad(Rows::kExpand, {y, v});
  binding::refuse_grad(Rows::kExpand, b);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_expand(y, v, b, ranks, scalings, indptr, slots, out_first);
  }
  if (!y.is_inference()) y.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "sgmv_(Tensor(a!) y, Tensor x, Tensor[] a_pool, Tensor[] b_pool, Tensor ranks, Tensor scalings, "
      "Tensor segment_indptr, Tensor segment_slots, bool out_first=False) -> ()",
      tags);
  m.def("sgmv_shrink(Tensor x, Tensor[] a_pool, Tensor ranks, Tensor segment_indptr, Tensor segment_slots) -> Tensor",
        tags);
  m.def(
      "sgmv_expand_(Tensor(a!) y, Tensor v, Tensor[] b_pool, Tensor ranks, Tensor scalings, Tensor segment_indptr, "
      "Tensor segment_slots, bool out_first=False) -> ()",
      tags);
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) {
  m.impl("sgmv_", &add<binding::pool_add<Rows>>);
  m.impl("sgmv_shrink", &shrink);
  m.impl("sgmv_expand_", &expand);
}

#if defined(PYLORA_WITH_CUDA)
TORCH_LIBRARY_IMPL(pylora, CUDA, m) {
  m.impl("sgmv_", &add<binding::pool_add<Rows>>);
  m.impl("sgmv_shrink", &shrink);
  m.impl("sgmv_expand_", &expand);
}
#endif

TORCH_LIBRARY_IMPL(pylora, Autograd, m) {
  m.impl("sgmv_", &add<binding::pool_add_autograd<Rows>>);
  m.impl("sgmv_shrink", &shrink_autograd);
  m.impl("sgmv_expand_", &expand_autograd);
}

}  // namespace pylora::sgmv
