// pylora::bgmv_, bgmv_shrink and bgmv_expand_: a slot for each token.
#include <torch/library.h>

#include "bgmv/bgmv.h"
#include "bgmv/call.h"
#include "binding/pool_ops.h"

namespace pylora::bgmv {
namespace {

/// token_slots, and the scratch of the plan that is made of them.
struct Rows {
  static constexpr const char *kAdd = "bgmv_", *kShrink = "bgmv_shrink", *kExpand = "bgmv_expand_";
  static constexpr size_t kCount = 1;

  explicit Rows(std::vector<Tensor> given) : tensors(std::move(given)) {}

  SegmentPlan plan(const char* op, const Tensor& like, int64_t num_slots) {
    const Tensor& slots = tensors[0];
    const int64_t num_tokens = like.size(0);
    binding::check_indices(op, "token_slots", slots, num_tokens, like);
    binding::check_slots(op, "token_slots", slots, num_slots);
    if (!slots.is_cpu()) {
      SegmentPlan plan;
      plan.num_segments = num_tokens;
      plan.slots = slots.const_data_ptr<int32_t>();
      plan.on_device = true;
      return plan;
    }
    scratch.resize(static_cast<size_t>(scratch_size(num_tokens, num_slots)));
    return group_by_slot(slots.const_data_ptr<int32_t>(), num_tokens, num_slots, scratch.data());
  }

  void call_add(const Tensor& y, const Tensor& x, TensorList a, TensorList b, const Tensor& ranks,
                const Tensor& scalings, bool out_first) const {
    bgmv::call_add(y, x, a, b, ranks, scalings, tensors[0], out_first);
  }

  std::vector<Tensor> tensors;
  std::vector<int32_t> scratch;
};

using Ops = binding::PoolOps<Rows>;

template <void (*body)(const Tensor&, const Tensor&, TensorList, TensorList, const Tensor&, const Tensor&, Rows, bool)>
void add(const Tensor& y, const Tensor& x, TensorList a, TensorList b, const Tensor& ranks, const Tensor& scalings,
         const Tensor& slots, bool out_first) {
  body(y, x, a, b, ranks, scalings, Rows({slots}), out_first);
}

Tensor shrink(const Tensor& x, TensorList a, const Tensor& ranks, const Tensor& slots) {
  return Ops::shrink(x, a, ranks, Rows({slots}));
}

void expand(const Tensor& y, const Tensor& v, TensorList b, const Tensor& ranks, const Tensor& scalings,
            const Tensor& slots, bool out_first) {
  Ops::expand(y, v, b, ranks, scalings, Rows({slots}), out_first);
}

Tensor shrink_autograd(const Tensor& x, TensorList a, const Tensor& ranks, const Tensor& slots) {
  binding::refuse_grad(Rows::kShrink, {x});
  binding::refuse_grad(Rows::kShrink, a);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_shrink(x, a, ranks, slots);
}

void expand_autograd(const Tensor& y, const Tensor& v, TensorList b, const Tensor& ranks, const Tensor& scalings,
                     const Tensor& slots, bool out_first) {
  binding::refuse_grad(Rows::kExpand, {y, v});
  binding::refuse_grad(Rows::kExpand, b);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_expand(y, v, b, ranks, scalings, slots, out_first);
  }
  if (!y.is_inference()) y.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "bgmv_(Tensor(a!) y, Tensor x, Tensor[] a_pool, Tensor[] b_pool, Tensor ranks, Tensor scalings, "
      "Tensor token_slots, bool out_first=False) -> ()",
      tags);
  m.def("bgmv_shrink(Tensor x, Tensor[] a_pool, Tensor ranks, Tensor token_slots) -> Tensor", tags);
  m.def(
      "bgmv_expand_(Tensor(a!) y, Tensor v, Tensor[] b_pool, Tensor ranks, Tensor scalings, "
      "Tensor token_slots, bool out_first=False) -> ()",
      tags);
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) {
  m.impl("bgmv_", &add<binding::pool_add<Rows>>);
  m.impl("bgmv_shrink", &shrink);
  m.impl("bgmv_expand_", &expand);
}

#if defined(PYLORA_WITH_CUDA)
TORCH_LIBRARY_IMPL(pylora, CUDA, m) {
  m.impl("bgmv_", &add<binding::pool_add<Rows>>);
  m.impl("bgmv_shrink", &shrink);
  m.impl("bgmv_expand_", &expand);
}
#endif

TORCH_LIBRARY_IMPL(pylora, Autograd, m) {
  m.impl("bgmv_", &add<binding::pool_add_autograd<Rows>>);
  m.impl("bgmv_shrink", &shrink_autograd);
  m.impl("bgmv_expand_", &expand_autograd);
}

}  // namespace pylora::bgmv
