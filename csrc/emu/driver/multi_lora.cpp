#include <vector>

#include "emu/driver/binder.h"
#include "multi_lora/cuda_adapters.h"

namespace pylora::emu {
namespace {

using namespace pylora::multi_lora;

/// A launcher's arguments with the arrays that they point to.
template <class Args>
struct Held {
  Args args;
  std::vector<SegmentSlot> slots;
  std::vector<void*> da, db;
};

template <class Args>
using Member = std::vector<void*> Held<Args>::*;

/// A tensor for each adapter: [rank, in_features] or [out_features, rank].
template <class Args>
typename Fields<Held<Args>>::Setter factors(ConstMatrix SegmentSlot::* factor) {
  return [factor](Held<Args>& call, py::handle list, std::vector<Region>& regions) {
    call.slots.resize(py::len(list));
    size_t i = 0;
    for (const py::handle tensor : list) {
      SegmentSlot& slot = call.slots[i++];
      assign(slot.*factor, tensor, regions);
      assign(slot.dtype, tensor.attr("dtype"), regions);
      slot.rank = tensor.attr("shape")[py::int_(factor == &SegmentSlot::a ? 0 : 1)].template cast<int64_t>();
    }
  };
}

template <class Args>
typename Fields<Held<Args>>::Setter gradients(Member<Args> member) {
  return [member](Held<Args>& call, py::handle list, std::vector<Region>& regions) {
    for (const py::handle tensor : list)
      (call.*member).push_back(reinterpret_cast<void*>(address_of(tensor, true, regions)));
  };
}

template <class Args, class T>
typename Fields<Held<Args>>::Setter of_plan(T SegmentPlan::* member) {
  return [member](Held<Args>& call, py::handle value, std::vector<Region>& regions) {
    assign(call.args.batch.plan.*member, value, regions);
  };
}

/// A part of a plan that stays on the host: its memory is no region.
template <class Args>
typename Fields<Held<Args>>::Setter of_host(const int32_t* SegmentPlan::* member) {
  return [member](Held<Args>& call, py::handle tensor, std::vector<Region>&) {
    call.args.batch.plan.*member = reinterpret_cast<const int32_t*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  };
}

template <class Args, class T>
typename Fields<Held<Args>>::Setter of_shape(T SegmentShape::* member) {
  return [member](Held<Args>& call, py::handle value, std::vector<Region>& regions) {
    assign(call.args.batch.shape.*member, value, regions);
  };
}

template <class Args, class T>
typename Fields<Held<Args>>::Setter of_args(T Args::* member) {
  return [member](Held<Args>& call, py::handle value, std::vector<Region>& regions) {
    assign(call.args.*member, value, regions);
  };
}

template <class Args>
Fields<Held<Args>> batch_fields() {
  Fields<Held<Args>> fields;
  fields.set("in_features", of_shape<Args>(&SegmentShape::in_features))
      .set("out_features", of_shape<Args>(&SegmentShape::out_features))
      .set("v_stride", of_shape<Args>(&SegmentShape::v_stride))
      .set("dtype", of_shape<Args>(&SegmentShape::dtype))
      .set("num_segments", of_plan<Args>(&SegmentPlan::num_segments))
      .set("tokens_per_row", of_plan<Args>(&SegmentPlan::tokens_per_row))
      .set("order", of_plan<Args>(&SegmentPlan::order))
      .set("indptr", of_plan<Args>(&SegmentPlan::indptr))
      .set("plan_slots", of_plan<Args>(&SegmentPlan::slots))
      .set("host_order", of_host<Args>(&SegmentPlan::order))
      .set("host_indptr", of_host<Args>(&SegmentPlan::indptr))
      .set("host_plan_slots", of_host<Args>(&SegmentPlan::slots))
      .set("on_device", of_plan<Args>(&SegmentPlan::on_device))
      .set("num_tokens", [](Held<Args>& call, py::handle value,
                            std::vector<Region>&) { call.args.batch.num_tokens = value.cast<int64_t>(); })
      .set("a", factors<Args>(&SegmentSlot::a))
      .set("b", factors<Args>(&SegmentSlot::b))
      .set("scalings",
           [](Held<Args>& call, py::handle list, std::vector<Region>&) {
             call.slots.resize(py::len(list));
             size_t i = 0;
             for (const py::handle value : list)
               call.slots[i++].scaling = value.cast<double>();
           })
      .set("dropouts", [](Held<Args>& call, py::handle list, std::vector<Region>& regions) {
        call.slots.resize(py::len(list));
        size_t i = 0;
        for (const py::handle value : list)
          assign(call.slots[i++].dropout, value, regions);
      });
  return fields;
}

template <class Args>
Args with_arrays(const Held<Args>& call) {
  Args args = call.args;
  args.batch.slots = call.slots.data();
  args.batch.num_slots = static_cast<int64_t>(call.slots.size());
  return args;
}

Status forward(const Context& context, const Held<ForwardArgs>& call) {
  return forward_cuda(context, with_arrays(call));
}

Status backward(const Context& context, const Held<BackwardArgs>& call) {
  BackwardArgs args = with_arrays(call);
  args.da = call.da.empty() ? nullptr : call.da.data();
  args.db = call.db.empty() ? nullptr : call.db.data();
  return backward_cuda(context, args);
}

template <Status (*launch)(const Context&, const EmbeddingArgs&)>
Status embedding(const Context& context, const Held<EmbeddingArgs>& call) {
  EmbeddingArgs args = with_arrays(call);
  args.da = call.da.data();
  args.db = call.db.data();
  return launch(context, args);
}

int64_t embedding_bytes(const Held<EmbeddingArgs>& call) { return embedding_workspace_bytes(with_arrays(call).batch); }
int64_t forward_bytes(const Held<ForwardArgs>& call) { return forward_workspace_bytes(with_arrays(call).batch); }
int64_t backward_bytes(const Held<ForwardArgs>& call) { return backward_workspace_bytes(with_arrays(call).batch); }

void define(py::module_& module) {
  Fields<Held<ForwardArgs>> forward_fields = batch_fields<ForwardArgs>();
  def_function(module, "forward_workspace_bytes", forward_fields, &forward_bytes);
  def_function(module, "backward_workspace_bytes", forward_fields, &backward_bytes);
  forward_fields.set("x", of_args<ForwardArgs>(&ForwardArgs::x))
      .set("y", of_args<ForwardArgs>(&ForwardArgs::y))
      .set("v", of_args<ForwardArgs>(&ForwardArgs::v))
      .set("workspace", of_args<ForwardArgs>(&ForwardArgs::workspace));
  def_launcher(module, "forward", forward_fields, &forward);

  Fields<Held<BackwardArgs>> backward_fields = batch_fields<BackwardArgs>();
  backward_fields.set("dy", of_args<BackwardArgs>(&BackwardArgs::dy))
      .set("x", of_args<BackwardArgs>(&BackwardArgs::x))
      .set("v", of_args<BackwardArgs>(&BackwardArgs::v))
      .set("dx", of_args<BackwardArgs>(&BackwardArgs::dx))
      .set("da", gradients<BackwardArgs>(&Held<BackwardArgs>::da))
      .set("db", gradients<BackwardArgs>(&Held<BackwardArgs>::db))
      .set("workspace", of_args<BackwardArgs>(&BackwardArgs::workspace));
  def_launcher(module, "backward", backward_fields, &backward);

  Fields<Held<EmbeddingArgs>> embedding_fields = batch_fields<EmbeddingArgs>();
  def_function(module, "embedding_workspace_bytes", embedding_fields, &embedding_bytes);
  embedding_fields.set("columns", of_args<EmbeddingArgs>(&EmbeddingArgs::columns))
      .set("frozen_column", of_args<EmbeddingArgs>(&EmbeddingArgs::frozen_column))
      .set("y", of_args<EmbeddingArgs>(&EmbeddingArgs::y))
      .set("dy", of_args<EmbeddingArgs>(&EmbeddingArgs::dy))
      .set("da", gradients<EmbeddingArgs>(&Held<EmbeddingArgs>::da))
      .set("db", gradients<EmbeddingArgs>(&Held<EmbeddingArgs>::db))
      .set("workspace", of_args<EmbeddingArgs>(&EmbeddingArgs::workspace));
  def_launcher(module, "embedding_forward", embedding_fields, &embedding<embedding_forward_cuda>);
  def_launcher(module, "embedding_backward", embedding_fields, &embedding<embedding_backward_cuda>);
}

const Registration registration("multi_lora", &define);

}  // namespace
}  // namespace pylora::emu
