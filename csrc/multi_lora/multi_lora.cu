// multi_lora's launchers on CUDA: they lay out a workspace, send what the host knows and queue the kernels over segments.
#include "multi_lora/cuda_adapters.h"
#include "multi_lora/lookup.cuh"

namespace pylora::multi_lora {
namespace {

using cuda::Place;
using cuda::SlotEntry;

int64_t max_rank(const Batch& batch) {
  int64_t rank = 0;
  for (int64_t i = 0; i < batch.num_slots; ++i)
    rank = batch.slots[i].rank > rank ? batch.slots[i].rank : rank;
  return rank;
}

const Dropout* active_dropout(const Batch& batch) {
  for (int64_t i = 0; i < batch.num_slots; ++i)
    if (batch.slots[i].dropout.active()) return &batch.slots[i].dropout;
  return nullptr;
}

/// Few rows a segment, all of 16 bits: shrink and expand are one launch. Beyond about two groups of eight rows a segment,
/// items of 64 rows read the factors less often.
bool decodes(const Batch& batch) {
  return dtype_bytes(batch.shape.dtype) == 2 && batch.num_slots > 0 && batch.slots[0].dtype == batch.shape.dtype &&
         !active_dropout(batch) && batch.num_tokens <= 2 * cuda::kDecodeRows * batch.plan.num_segments;
}

/// Where the parts of a workspace begin. Counters come first.
struct Layout {
  int64_t num_counters = 0, uploaded = 0, plan = 0, planes = 0, g = 0, bytes = 0;
};

cuda::BatchPlan plan_of(const Batch& batch) { return {batch.plan, batch.num_tokens, batch.num_slots}; }

Layout layout_of(const Batch& batch, int item_rows, int64_t num_counters, int64_t plane_bytes, int64_t g_bytes) {
  const cuda::BatchPlan plan = plan_of(batch);
  Layout layout;
  layout.num_counters = num_counters;
  layout.uploaded = align_up(num_counters * 4);
  layout.plan = layout.uploaded +
                align_up(batch.num_slots * static_cast<int64_t>(sizeof(SlotEntry)) + cuda::uploaded_bytes(plan));
  layout.planes = layout.plan + align_up(cuda::plan_bytes(plan, item_rows));
  layout.g = layout.planes + align_up(plane_bytes);
  layout.bytes = layout.g + align_up(g_bytes);
  return layout;
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t shrink_planes(const Batch& batch, int64_t items, int64_t rank, int64_t width) {
  const int64_t tiles = cuda::shrink_rank_tiles(rank, 1);
  return cuda::shrink_plane_bytes(items, tiles, cuda::shrink_splits(items, rank, 1, width), batch.shape.dtype);
}

Layout forward_layout(const Batch& batch) {
  const int64_t rank = max_rank(batch);
  if (decodes(batch)) {
    const int64_t groups = plan_of(batch).most_items(cuda::kDecodeRows);
    return layout_of(batch, cuda::kDecodeRows, cuda::decode_counters(groups),
                     cuda::decode_plane_bytes(groups, rank, 1, batch.shape.in_features), 0);
  }
  const int64_t items = plan_of(batch).most_items(cuda::kItemRows);
  return layout_of(batch, cuda::kItemRows, cuda::shrink_counters(items, cuda::shrink_rank_tiles(rank, 1)),
                   shrink_planes(batch, items, rank, batch.shape.in_features), 0);
}

int64_t outer_tiles(const Batch& batch, int64_t rank, int64_t width) {
  return cuda::outer_tiles(batch.num_slots, rank, width, batch.shape.dtype);
}

int64_t outer_planes(const Batch& batch, int64_t items, int64_t rank, int64_t width) {
  const int64_t tiles = outer_tiles(batch, rank, width);
  return cuda::outer_plane_bytes(tiles, cuda::outer_splits(items, tiles, rank), batch.shape.dtype);
}

/// v or g.
int64_t low_rank_bytes(const Batch& batch) {
  return batch.num_tokens * batch.shape.v_stride * dtype_bytes(accumulator_dtype(batch.shape.dtype));
}

Layout backward_layout(const Batch& batch) {
  const int64_t rank = max_rank(batch), items = plan_of(batch).most_items(cuda::kItemRows);
  const int64_t in = batch.shape.in_features, out = batch.shape.out_features;
  const int64_t counters =
      larger(cuda::shrink_counters(items, cuda::shrink_rank_tiles(rank, 1)), outer_tiles(batch, rank, larger(in, out)));
  const int64_t planes = larger(shrink_planes(batch, items, rank, out),
                                larger(outer_planes(batch, items, rank, in), outer_planes(batch, items, rank, out)));
  return layout_of(batch, cuda::kItemRows, counters, planes, low_rank_bytes(batch));
}

/// v and g lie at the end.
Layout embedding_layout(const Batch& batch) {
  const int64_t rank = max_rank(batch), items = plan_of(batch).most_items(cuda::kItemRows);
  const int64_t out = batch.shape.out_features;
  const int64_t counters =
      larger(cuda::shrink_counters(items, cuda::shrink_rank_tiles(rank, 1)), outer_tiles(batch, rank, out));
  return layout_of(batch, cuda::kItemRows, counters,
                   larger(shrink_planes(batch, items, rank, out), outer_planes(batch, items, rank, out)),
                   2 * align_up(low_rank_bytes(batch)));
}

/// What every launch of a call is given.
struct Prepared {
  cuda::Plan plan;
  cuda::Slots slots;
  cuda::Factor a, b;
  Dropout dropout;
  const SlotEntry* entries = nullptr;
  DType dtype = DType::f32, factor_dtype = DType::f32;
  int64_t v_stride = 0;
  int32_t* counters = nullptr;
  void* planes = nullptr;
};

SlotEntry entry_of(const SegmentSlot& slot) {
  SlotEntry entry;
  entry.a = {slot.a.data, slot.a.row_stride, slot.a.column_stride};
  entry.b = {slot.b.data, slot.b.column_stride, slot.b.row_stride};
  entry.rank = static_cast<int32_t>(slot.rank);
  entry.scaling = slot.scaling;
  entry.threshold = slot.dropout.threshold;
  entry.keep_scale = slot.dropout.keep_scale;
  return entry;
}

/// da, db: null, or for each slot where its gradients go.
Status prepare(const Context& context, const Batch& batch, const Layout& layout, int item_rows, void* workspace,
               void* const* da, void* const* db, Prepared* prepared) {
  char* const memory = static_cast<char*>(workspace);
  prepared->counters = static_cast<int32_t*>(workspace);
  prepared->planes = memory + layout.planes;
  prepared->dtype = batch.shape.dtype;
  prepared->factor_dtype = batch.num_slots > 0 ? batch.slots[0].dtype : batch.shape.dtype;
  prepared->v_stride = batch.shape.v_stride;
  prepared->entries = reinterpret_cast<const SlotEntry*>(memory + layout.uploaded);
  cuda::Upload upload(context, memory + layout.uploaded, prepared->counters, layout.num_counters);
  cuda::FactorLayout a(prepared->factor_dtype), b(prepared->factor_dtype);
  for (int64_t i = 0; i < batch.num_slots; ++i) {
    if (batch.slots[i].dtype != prepared->factor_dtype)
      return invalid_argument("multi_lora_linear: expected adapters of one dtype");
    SlotEntry entry = entry_of(batch.slots[i]);
    if (da) entry.da = {da[i], batch.shape.in_features, 1};
    if (db) entry.db = {db[i], 1, entry.rank};
    a.add(entry.a);
    b.add(entry.b);
    upload.add(&entry, sizeof(entry));
  }
  prepared->a = a.factor(&prepared->entries->a);
  prepared->b = b.factor(&prepared->entries->b);
  prepared->slots.entries = prepared->entries;
  prepared->slots.max_rank = max_rank(batch);
  if (const Dropout* dropout = active_dropout(batch)) prepared->dropout = *dropout;
  const cuda::BatchPlan plan = cuda::on_device(plan_of(batch), upload);
  if (const Status status = upload.finish(); !status.is_ok()) return status;
  return cuda::queue_plan(context, plan, item_rows, memory + layout.plan, &prepared->plan);
}

Status decode(const Context& context, const ForwardArgs& args, const Prepared& prepared) {
  cuda::DecodeArgs decode;
  decode.plan = prepared.plan;
  decode.slots = prepared.slots;
  decode.dtype = prepared.dtype;
  decode.x = args.x;
  decode.width = args.batch.shape.in_features;
  decode.a[0] = prepared.a;
  decode.b[0] = prepared.b;
  decode.widths[0] = args.batch.shape.out_features;
  decode.y = args.y;
  decode.v = {args.v, 0, prepared.v_stride};
  decode.counters = prepared.counters;
  decode.planes = static_cast<float*>(prepared.planes);
  return cuda::decode(context, decode);
}

Status shrink(const Context& context, const Prepared& prepared, ConstMatrix x, int64_t width,
              const cuda::Factor& factor, const Dropout& dropout, bool scaled, void* v) {
  cuda::ShrinkArgs args;
  args.plan = prepared.plan;
  args.slots = prepared.slots;
  args.dtype = prepared.dtype;
  args.factor_dtype = prepared.factor_dtype;
  args.x = x;
  args.width = width;
  args.factors[0] = factor;
  args.v = {v, 0, prepared.v_stride};
  args.scaled = scaled;
  args.dropout = dropout;
  args.num_splits = cuda::shrink_splits(args.plan.max_items, args.slots.max_rank, 1, width);
  args.counters = prepared.counters;
  args.planes = prepared.planes;
  return cuda::shrink(context, args);
}

Status expand(const Context& context, const Prepared& prepared, const void* v, const cuda::Factor& factor,
              int64_t width, const Dropout& dropout, bool scaled, MutableMatrix y) {
  cuda::ExpandArgs args;
  args.plan = prepared.plan;
  args.slots = prepared.slots;
  args.dtype = prepared.dtype;
  args.factor_dtype = prepared.factor_dtype;
  args.v = {v, 0, prepared.v_stride};
  args.factors[0] = factor;
  args.widths[0] = width;
  args.y = y;
  args.dropout = dropout;
  args.scaled = scaled;
  return cuda::expand(context, args);
}

Status outer(const Context& context, const Prepared& prepared, int64_t num_slots, const void* g, ConstMatrix x,
             int64_t width, const Dropout& dropout, bool scaled, const Place<void*>* places) {
  cuda::OuterArgs args;
  args.plan = prepared.plan;
  args.slots = prepared.slots;
  args.num_slots = num_slots;
  args.dtype = prepared.dtype;
  args.g = {g, 0, prepared.v_stride};
  args.x = x;
  args.width = width;
  args.scaled = scaled;
  args.dropout = dropout;
  args.out_dtype = prepared.factor_dtype;
  args.places = places;
  const int64_t tiles = cuda::outer_tiles(num_slots, args.slots.max_rank, width, args.dtype);
  args.num_splits = cuda::outer_splits(args.plan.max_items, tiles, args.slots.max_rank);
  args.counters = prepared.counters;
  args.planes = prepared.planes;
  return cuda::outer(context, args);
}

template <auto kernel_f32, auto kernel_f64>
Status look_up(const Context& context, const Prepared& prepared, const EmbeddingArgs& args, int64_t pieces, void* v) {
  LookupWork work;
  work.plan = prepared.plan;
  work.slots = prepared.slots;
  work.factor_dtype = prepared.factor_dtype;
  work.a = prepared.a;
  work.da = &prepared.entries->da;
  work.columns = args.columns;
  work.num_columns = args.batch.shape.in_features;
  work.frozen_column = args.frozen_column;
  work.v = v;
  work.v_stride = prepared.v_stride;
  constexpr int kResident = 8;
  if (prepared.dtype == DType::f64)
    return cuda::launch_blocks<kernel_f64, cuda::kThreads, 0>(context.stream, pieces, kResident, 0, work);
  return cuda::launch_blocks<kernel_f32, cuda::kThreads, 0>(context.stream, pieces, kResident, 0, work);
}

}  // namespace

int64_t forward_workspace_bytes(const Batch& batch) { return forward_layout(batch).bytes; }
int64_t backward_workspace_bytes(const Batch& batch) { return backward_layout(batch).bytes; }

Status forward_cuda(const Context& context, const ForwardArgs& args) {
  const Batch& batch = args.batch;
  if (batch.num_tokens == 0 || max_rank(batch) == 0) return {};
  const bool one_launch = decodes(batch);
  const int item_rows = one_launch ? cuda::kDecodeRows : cuda::kItemRows;
  Prepared prepared;
  Status status =
      prepare(context, batch, forward_layout(batch), item_rows, args.workspace, nullptr, nullptr, &prepared);
  if (!status.is_ok()) return status;
  if (one_launch) return decode(context, args, prepared);
  status = shrink(context, prepared, args.x, batch.shape.in_features, prepared.a, prepared.dropout, false, args.v);
  if (!status.is_ok()) return status;
  return expand(context, prepared, args.v, prepared.b, batch.shape.out_features, Dropout{}, true, args.y);
}

Status backward_cuda(const Context& context, const BackwardArgs& args) {
  const Batch& batch = args.batch;
  if (max_rank(batch) == 0) return {};
  const Layout layout = backward_layout(batch);
  const int64_t in = batch.shape.in_features, out = batch.shape.out_features;
  void* const g = static_cast<char*>(args.workspace) + layout.g;
  Prepared prepared;
  Status status = prepare(context, batch, layout, cuda::kItemRows, args.workspace, args.da, args.db, &prepared);
  if (status.is_ok() && (args.dx.data || args.da))
    status = shrink(context, prepared, args.dy, out, prepared.b, Dropout{}, true, g);
  if (status.is_ok() && args.dx.data)
    status = expand(context, prepared, g, prepared.a, in, prepared.dropout, false, args.dx);
  if (status.is_ok() && args.da)
    status = outer(context, prepared, batch.num_slots, g, args.x, in, prepared.dropout, false, &prepared.entries->da);
  if (status.is_ok() && args.db)
    status = outer(context, prepared, batch.num_slots, args.v, args.dy, out, Dropout{}, true, &prepared.entries->db);
  return status;
}

int64_t embedding_workspace_bytes(const Batch& batch) { return embedding_layout(batch).bytes; }

Status embedding_forward_cuda(const Context& context, const EmbeddingArgs& args) {
  const Batch& batch = args.batch;
  if (batch.num_tokens == 0 || max_rank(batch) == 0) return {};
  const Layout layout = embedding_layout(batch);
  void* const v = static_cast<char*>(args.workspace) + layout.g;
  Prepared prepared;
  Status status = prepare(context, batch, layout, cuda::kItemRows, args.workspace, nullptr, nullptr, &prepared);
  if (status.is_ok())
    status = look_up<lookup_kernel<float>, lookup_kernel<double>>(context, prepared, args, prepared.plan.max_items, v);
  if (!status.is_ok()) return status;
  return expand(context, prepared, v, prepared.b, batch.shape.out_features, Dropout{}, true, args.y);
}

Status embedding_backward_cuda(const Context& context, const EmbeddingArgs& args) {
  const Batch& batch = args.batch;
  if (max_rank(batch) == 0) return {};
  const Layout layout = embedding_layout(batch);
  const int64_t out = batch.shape.out_features;
  char* const v = static_cast<char*>(args.workspace) + layout.g;
  char* const g = v + align_up(low_rank_bytes(batch));
  Prepared prepared;
  Status status = prepare(context, batch, layout, cuda::kItemRows, args.workspace, args.da, args.db, &prepared);
  const int64_t items = prepared.plan.max_items;
  if (status.is_ok()) status = look_up<lookup_kernel<float>, lookup_kernel<double>>(context, prepared, args, items, v);
  if (status.is_ok()) status = shrink(context, prepared, args.dy, out, prepared.b, Dropout{}, true, g);
  if (status.is_ok())
    status = look_up<scatter_kernel<float>, scatter_kernel<double>>(context, prepared, args,
                                                                    items * cuda::kItemRows / kRowsAtOnce, g);
  if (!status.is_ok()) return status;
  return outer(context, prepared, batch.num_slots, v, args.dy, out, Dropout{}, true, &prepared.entries->db);
}

}  // namespace pylora::multi_lora
