#include "cuda/segments.h"

#include "emu/driver/binder.h"

namespace pylora::emu {
namespace {

using namespace pylora::cuda;

/// Fields that every kernel over segments has.
template <class Args>
Fields<Args> segment_fields() {
  Fields<Args> fields;
  fields.field("items", &Args::plan, &Plan::items)
      .field("num_items", &Args::plan, &Plan::num_items)
      .field("order", &Args::plan, &Plan::order)
      .field("max_items", &Args::plan, &Plan::max_items)
      .field("num_rows", &Args::plan, &Plan::num_rows)
      .field("ranks", &Args::slots, &Slots::ranks)
      .field("scalings", &Args::slots, &Slots::scalings)
      .field("max_rank", &Args::slots, &Slots::max_rank)
      .field("scaling", &Args::slots, &Slots::scaling)
      .field("dtype", &Args::dtype)
      .field("factor_dtype", &Args::factor_dtype);
  return fields;
}

void assign_factor(Factor& factor, py::handle tensor, std::vector<Region>& regions) {
  assign(factor.data, tensor, regions);
  factor.slot_stride = tensor.attr("stride")(0).cast<int64_t>();
  factor.rank_stride = tensor.attr("stride")(1).cast<int64_t>();
  factor.column_stride = tensor.attr("stride")(2).cast<int64_t>();
}

/// A list of [slots, rank, width] tensors.
template <class Args>
typename Fields<Args>::Setter factors(Factor (Args::*member)[kMaxSlices]) {
  return [member](Args& args, py::handle list, std::vector<Region>& regions) {
    args.num_slices = 0;
    for (const py::handle tensor : list)
      assign_factor((args.*member)[args.num_slices++], tensor, regions);
  };
}

/// A [slices, rows, rank] tensor.
template <class Args, class Pointer>
typename Fields<Args>::Setter low_rank(LowRank<Pointer> Args::* member) {
  return [member](Args& args, py::handle tensor, std::vector<Region>& regions) {
    LowRank<Pointer>& v = args.*member;
    assign(v.data, tensor, regions);
    v.slice_stride = tensor.attr("stride")(0).cast<int64_t>();
    v.row_stride = tensor.attr("stride")(1).cast<int64_t>();
  };
}

template <class Args>
typename Fields<Args>::Setter numbers(int64_t (Args::*member)[kMaxSlices]) {
  return [member](Args& args, py::handle list, std::vector<Region>&) {
    int i = 0;
    for (const py::handle value : list)
      (args.*member)[i++] = value.cast<int64_t>();
  };
}

void define_shrink(py::module_& module) {
  Fields<ShrinkArgs> fields = segment_fields<ShrinkArgs>();
  fields.field("x", &ShrinkArgs::x)
      .field("width", &ShrinkArgs::width)
      .field("scaled", &ShrinkArgs::scaled)
      .field("dropout", &ShrinkArgs::dropout)
      .field("num_splits", &ShrinkArgs::num_splits)
      .field("counters", &ShrinkArgs::counters)
      .field("planes", &ShrinkArgs::planes)
      .set("factors", factors(&ShrinkArgs::factors))
      .set("v", low_rank(&ShrinkArgs::v));
  def_launcher(module, "shrink", fields, &shrink);
  module.def("shrink_splits", &shrink_splits);
  module.def("shrink_workspace", [](int64_t max_items, int64_t max_rank, int num_slices, int num_splits, bool wide) {
    const int64_t tiles = shrink_rank_tiles(max_rank, num_slices);
    return py::make_tuple(shrink_counters(max_items, tiles),
                          shrink_plane_bytes(max_items, tiles, num_splits, wide ? DType::f64 : DType::f32));
  });
}

void define_decode(py::module_& module) {
  Fields<DecodeArgs> fields;
  fields.field("items", &DecodeArgs::plan, &Plan::items)
      .field("num_items", &DecodeArgs::plan, &Plan::num_items)
      .field("order", &DecodeArgs::plan, &Plan::order)
      .field("max_items", &DecodeArgs::plan, &Plan::max_items)
      .field("num_rows", &DecodeArgs::plan, &Plan::num_rows)
      .field("row_slots", &DecodeArgs::row_slots)
      .field("ranks", &DecodeArgs::slots, &Slots::ranks)
      .field("scalings", &DecodeArgs::slots, &Slots::scalings)
      .field("max_rank", &DecodeArgs::slots, &Slots::max_rank)
      .field("scaling", &DecodeArgs::slots, &Slots::scaling)
      .field("dtype", &DecodeArgs::dtype)
      .field("x", &DecodeArgs::x)
      .field("width", &DecodeArgs::width)
      .field("y", &DecodeArgs::y)
      .field("counters", &DecodeArgs::counters)
      .field("planes", &DecodeArgs::planes)
      .set("a", factors(&DecodeArgs::a))
      .set("b", factors(&DecodeArgs::b))
      .set("widths", numbers(&DecodeArgs::widths))
      .set("columns", numbers(&DecodeArgs::columns))
      .set("v", low_rank(&DecodeArgs::v));
  def_launcher(module, "decode", fields, &decode);
  module.def("decode_plane_bytes", &decode_plane_bytes);
}

void define_outer(py::module_& module) {
  Fields<OuterArgs> fields;
  fields.field("items", &OuterArgs::plan, &Plan::items)
      .field("num_items", &OuterArgs::plan, &Plan::num_items)
      .field("order", &OuterArgs::plan, &Plan::order)
      .field("max_items", &OuterArgs::plan, &Plan::max_items)
      .field("num_rows", &OuterArgs::plan, &Plan::num_rows)
      .field("ranks", &OuterArgs::slots, &Slots::ranks)
      .field("scalings", &OuterArgs::slots, &Slots::scalings)
      .field("max_rank", &OuterArgs::slots, &Slots::max_rank)
      .field("scaling", &OuterArgs::slots, &Slots::scaling)
      .field("num_slots", &OuterArgs::num_slots)
      .field("dtype", &OuterArgs::dtype)
      .field("x", &OuterArgs::x)
      .field("width", &OuterArgs::width)
      .field("scaled", &OuterArgs::scaled)
      .field("dropout", &OuterArgs::dropout)
      .field("out_dtype", &OuterArgs::out_dtype)
      .field("num_splits", &OuterArgs::num_splits)
      .field("counters", &OuterArgs::counters)
      .field("planes", &OuterArgs::planes)
      .set("g", low_rank(&OuterArgs::g))
      .set("out", [](OuterArgs& args, py::handle tensor, std::vector<Region>& regions) {
        assign(args.out, tensor, regions);
        args.slot_stride = tensor.attr("stride")(0).cast<int64_t>();
        args.rank_stride = tensor.attr("stride")(1).cast<int64_t>();
        args.column_stride = tensor.attr("stride")(2).cast<int64_t>();
      });
  def_launcher(module, "outer", fields, &outer);
  module.def("outer_workspace", [](int64_t num_slots, int64_t max_rank, int64_t width, int64_t max_items, bool half,
                                   bool wide, int num_splits) {
    const DType dtype = half ? DType::bf16 : wide ? DType::f64 : DType::f32;
    const int64_t tiles = outer_tiles(num_slots, max_rank, width, dtype);
    const int splits = num_splits > 0 ? num_splits : outer_splits(max_items, tiles, max_rank);
    return py::make_tuple(splits, tiles, outer_plane_bytes(tiles, splits, dtype));
  });
}

void define(py::module_& module) {
  Fields<PlanArgs> plan;
  plan.field("num_rows", &PlanArgs::num_rows)
      .field("num_segments", &PlanArgs::num_segments)
      .field("num_slots", &PlanArgs::num_slots)
      .field("item_rows", &PlanArgs::item_rows)
      .field("indptr", &PlanArgs::indptr)
      .field("slots", &PlanArgs::slots)
      .field("tokens_per_row", &PlanArgs::tokens_per_row)
      .field("order", &PlanArgs::order)
      .field("rows", &PlanArgs::rows)
      .field("starts", &PlanArgs::starts)
      .field("items", &PlanArgs::items)
      .field("max_items", &PlanArgs::max_items)
      .field("num_items", &PlanArgs::num_items);
  def_launcher(module, "plan_segments", plan, &plan_segments);
  def_launcher(module, "group_rows", plan, &group_rows);
  module.def("max_items", &max_items);
  define_shrink(module);
  define_decode(module);
  define_outer(module);

  Fields<ExpandArgs> expand_fields = segment_fields<ExpandArgs>();
  expand_fields.field("y", &ExpandArgs::y)
      .field("scaled", &ExpandArgs::scaled)
      .field("dropout", &ExpandArgs::dropout)
      .set("factors", factors(&ExpandArgs::factors))
      .set("widths", numbers(&ExpandArgs::widths))
      .set("columns", numbers(&ExpandArgs::columns))
      .set("v", low_rank(&ExpandArgs::v));
  def_launcher(module, "expand", expand_fields, &expand);
}

const Registration registration("segments", &define);

}  // namespace
}  // namespace pylora::emu
