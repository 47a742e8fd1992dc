// lora_cuda: one adapter is the case of one slot of csrc/cuda/segments.h. Few tokens without dropout take one launch.
#include "cuda/segments.h"
#include "lora/heuristics.h"
#include "lora/lora.h"

namespace pylora::lora {
namespace {

using cuda::Factor;
using cuda::LowRank;

/// a: ranks are rows; b: ranks are columns.
Factor factor_a(ConstMatrix a) { return {a.data, 0, a.row_stride, a.column_stride}; }
Factor factor_b(ConstMatrix b) { return {b.data, 0, b.column_stride, b.row_stride}; }

cuda::Slots slots_of(const Shape& shape, double scaling) {
  cuda::Slots slots;
  slots.max_rank = shape.rank;
  slots.scaling = scaling;
  return slots;
}

template <class Pointer>
LowRank<Pointer> low_rank(Pointer data, const Shape& shape) {
  return {data, shape.num_tokens * shape.rank, shape.rank};
}

Status shrink(const Context& context, const Shape& shape, ConstMatrix x, int64_t width, const Factor& factor,
              const Dropout& dropout, double scaling, void* v, void* workspace) {
  cuda::ShrinkArgs args;
  args.plan = cuda::plan_of_one_slot(shape.num_tokens);
  args.slots = slots_of(shape, scaling);
  args.dtype = shape.dtype;
  args.factor_dtype = shape.factor_dtype;
  args.x = x;
  args.width = width;
  args.factors[0] = factor;
  args.v = low_rank(v, shape);
  args.scaled = scaling != 1;
  args.dropout = dropout;
  args.num_splits = shrink_splits_cuda(shape, width);
  args.counters = static_cast<int32_t*>(workspace);
  args.planes = static_cast<char*>(workspace) + counter_bytes_cuda(shape);
  return cuda::shrink(context, args);
}

Status expand(const Context& context, const Shape& shape, const void* v, const Factor& factor, int64_t width,
              const Dropout& dropout, double scaling, MutableMatrix y) {
  cuda::ExpandArgs args;
  args.plan = cuda::plan_of_one_slot(shape.num_tokens);
  args.slots = slots_of(shape, scaling);
  args.dtype = shape.dtype;
  args.factor_dtype = shape.factor_dtype;
  args.v = low_rank(v, shape);
  args.factors[0] = factor;
  args.widths[0] = width;
  args.y = y;
  args.dropout = dropout;
  return cuda::expand(context, args);
}

Status decode(const Context& context, const ForwardArgs& args) {
  cuda::DecodeArgs decode;
  decode.plan = cuda::plan_of_one_slot(args.shape.num_tokens);
  decode.plan.max_items = cuda::decode_groups(args.shape.num_tokens);
  decode.slots = slots_of(args.shape, args.scaling);
  decode.dtype = args.shape.dtype;
  decode.x = args.x;
  decode.width = args.shape.in_features;
  decode.a[0] = factor_a(args.a);
  decode.b[0] = factor_b(args.b);
  decode.widths[0] = args.shape.out_features;
  decode.y = args.y;
  decode.v = low_rank(args.v, args.shape);
  decode.counters = static_cast<int32_t*>(args.workspace);
  decode.planes = reinterpret_cast<float*>(static_cast<char*>(args.workspace) + counter_bytes_cuda(args.shape));
  return cuda::decode(context, decode);
}

struct OuterOf {
  const void* g;
  ConstMatrix x;
  int64_t width;
  Dropout dropout;
  double scaling;
};

Status outer(const Context& context, const Shape& shape, const OuterOf& of, void* out, int64_t rank_stride,
             int64_t column_stride, void* workspace) {
  cuda::OuterArgs args;
  args.plan = cuda::plan_of_one_slot(shape.num_tokens);
  args.slots = slots_of(shape, of.scaling);
  args.dtype = shape.dtype;
  args.g = low_rank(of.g, shape);
  args.x = of.x;
  args.width = of.width;
  args.scaled = true;
  args.dropout = of.dropout;
  args.out_dtype = shape.factor_dtype;
  args.out = out;
  args.rank_stride = rank_stride;
  args.column_stride = column_stride;
  args.num_splits = outer_splits_cuda(shape, of.width);
  args.counters = static_cast<int32_t*>(workspace);
  args.planes = static_cast<char*>(workspace) + counter_bytes_cuda(shape);
  return cuda::outer(context, args);
}

}  // namespace

Status forward_cuda(const Context& context, const ForwardArgs& args) {
  const Shape& shape = args.shape;
  if (decodes_cuda(shape, args.dropout)) return decode(context, args);
  const Status status =
      shrink(context, shape, args.x, shape.in_features, factor_a(args.a), args.dropout, 1, args.v, args.workspace);
  if (!status.is_ok()) return status;
  return expand(context, shape, args.v, factor_b(args.b), shape.out_features, Dropout{}, args.scaling, args.y);
}

Status backward_cuda(const Context& context, const BackwardArgs& args) {
  const Shape& shape = args.shape;
  const void* g = args.g;
  if (!g && (args.dx.data || args.da)) {
    void* const own = static_cast<char*>(args.workspace) + counter_bytes_cuda(shape) + backward_planes_cuda(shape);
    const Status status = shrink(context, shape, args.dy, shape.out_features, factor_b(args.b), Dropout{}, args.scaling,
                                 own, args.workspace);
    if (!status.is_ok()) return status;
    g = own;
  }
  if (args.dx.data) {
    const Status status = expand(context, shape, g, factor_a(args.a), shape.in_features, args.dropout, 1, args.dx);
    if (!status.is_ok()) return status;
  }
  if (args.da) {
    const OuterOf of{g, args.x, shape.in_features, args.dropout, 1};
    const Status status = outer(context, shape, of, args.da, shape.in_features, 1, args.workspace);
    if (!status.is_ok()) return status;
  }
  if (!args.db) return {};
  const OuterOf of{args.v, args.dy, shape.out_features, Dropout{}, args.scaling};
  return outer(context, shape, of, args.db, 1, shape.rank, args.workspace);
}

}  // namespace pylora::lora
