#if defined(PYLORA_WITH_CUDA)

#include "binding/pools_cuda.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "binding/segments.h"
#include "cuda/batch.h"

namespace pylora::binding {
namespace {

/// A call's plan, ranks and scalings in device memory.
struct DeviceBatch {
  Tensor memory;  // counters, then what was sent, then the plan
  cuda::Plan plan;
  cuda::Slots slots;
  int32_t* counters = nullptr;
};

cuda::BatchPlan batch_plan(const Pools& pools, const SegmentPlan& plan, const Tensor& rows) {
  return {plan, rows.size(0), pools.num_slots()};
}

/// How the rows of a batch are cut.
struct Cut {
  int item_rows = cuda::kItemRows;  // 0: a row each, no plan is made
  int64_t num_counters = 0;
};

DeviceBatch to_device(const Pools& pools, const SegmentPlan& given, const Tensor& rows, const Cut& cut) {
  const cuda::BatchPlan plan = batch_plan(pools, given, rows);
  const int64_t num_slots = pools.num_slots(), counter_bytes = align_up(cut.num_counters * 4);
  const int64_t sent_bytes = align_up(cuda::uploaded_bytes(plan) + 2 * cuda::padded(num_slots * 4));
  const int64_t made_bytes = cut.item_rows > 0 ? cuda::plan_bytes(plan, cut.item_rows) : 0;
  DeviceBatch batch;
  batch.memory = workspace_of(counter_bytes + sent_bytes + made_bytes, rows);
  char* const memory = static_cast<char*>(batch.memory.mutable_data_ptr());
  batch.counters = reinterpret_cast<int32_t*>(memory);
  const Context context = device_context(rows.device());
  cuda::Upload upload(context, memory + counter_bytes, batch.counters, cut.num_counters);
  const auto on_device = [&](const Tensor& t) {
    return t.is_cpu() ? upload.add(t.const_data_ptr(), num_slots * 4) : t.const_data_ptr();
  };
  batch.slots.ranks = static_cast<const int32_t*>(on_device(pools.ranks));
  if (pools.scalings) batch.slots.scalings = static_cast<const float*>(on_device(*pools.scalings));
  batch.slots.max_rank = pools.max_rank();
  const cuda::BatchPlan sent = cuda::on_device(plan, upload);
  throw_unless_ok(upload.finish());
  if (cut.item_rows > 0) {
    throw_unless_ok(cuda::queue_plan(context, sent, cut.item_rows, memory + counter_bytes + sent_bytes, &batch.plan));
  } else {
    batch.plan.max_items = batch.plan.num_rows = rows.size(0);
  }
  return batch;
}

int64_t shrink_counters(const Pools& pools, const SegmentPlan& plan, const Tensor& rows) {
  const auto slices = static_cast<int>(std::min<size_t>(std::max(pools.a.size(), pools.b.size()), cuda::kMaxSlices));
  return cuda::shrink_counters(batch_plan(pools, plan, rows).most_items(cuda::kItemRows),
                               cuda::shrink_rank_tiles(pools.max_rank(), slices));
}

cuda::Factor factor_of(const Tensor& pool, bool out_first) {
  return {pool.const_data_ptr(), pool.stride(0), pool.stride(out_first ? 2 : 1), pool.stride(out_first ? 1 : 2)};
}

/// v = x f^T of a group of slices that read the same columns of x.
void run_shrink(const DeviceBatch& on, const Tensor& x, const std::vector<cuda::Factor>& factors, DType factor_dtype,
                const Tensor& v, bool scaled) {
  cuda::ShrinkArgs args;
  args.plan = on.plan;
  args.slots = on.slots;
  args.dtype = to_dtype(x.scalar_type());
  args.factor_dtype = factor_dtype;
  args.x = matrix(x);
  args.width = x.size(1);
  args.num_slices = static_cast<int>(factors.size());
  std::copy(factors.begin(), factors.end(), args.factors);
  args.v = {v.mutable_data_ptr(), v.stride(0), v.stride(1)};
  args.scaled = scaled;
  const int64_t tiles = cuda::shrink_rank_tiles(on.slots.max_rank, args.num_slices);
  args.num_splits = cuda::shrink_splits(on.plan.max_items, on.slots.max_rank, args.num_slices, args.width);
  const Tensor planes =
      workspace_of(cuda::shrink_plane_bytes(on.plan.max_items, tiles, args.num_splits, args.dtype), x);
  args.counters = on.counters;
  args.planes = planes.mutable_data_ptr();
  throw_unless_ok(cuda::shrink(device_context(x.device()), args));
}

void run_expand(const DeviceBatch& on, const Tensor& v, const std::vector<cuda::Factor>& factors, DType factor_dtype,
                const std::vector<int64_t>& widths, int64_t column, const Tensor& y, bool scaled) {
  cuda::ExpandArgs args;
  args.plan = on.plan;
  args.slots = on.slots;
  args.scaled = scaled;
  args.dtype = to_dtype(y.scalar_type());
  args.factor_dtype = factor_dtype;
  args.v = {v.const_data_ptr(), v.stride(0), v.stride(1)};
  args.num_slices = static_cast<int>(factors.size());
  std::copy(factors.begin(), factors.end(), args.factors);
  for (size_t i = 0; i < widths.size(); ++i) {
    args.widths[i] = widths[i];
    args.columns[i] = column;
    column += widths[i];
  }
  args.y = {y.mutable_data_ptr(), y.stride(0), 1};
  throw_unless_ok(cuda::expand(device_context(y.device()), args));
}

Tensor run_outer(const DeviceBatch& on, int64_t num_slots, const Tensor& g, const Tensor& x, const Tensor& like,
                 bool out_first, bool scaled) {
  const Tensor out = at::zeros(like.sizes(), like.options());
  cuda::OuterArgs args;
  args.plan = on.plan;
  args.slots = on.slots;
  args.num_slots = num_slots;
  args.dtype = to_dtype(x.scalar_type());
  args.g = {g.const_data_ptr(), 0, g.stride(0)};
  args.x = matrix(x);
  args.width = x.size(1);
  args.scaled = scaled;
  args.out_dtype = to_dtype(like.scalar_type());
  args.out = out.mutable_data_ptr();
  args.slot_stride = out.stride(0);
  args.rank_stride = out.stride(out_first ? 2 : 1);
  args.column_stride = out.stride(out_first ? 1 : 2);
  const int64_t tiles = cuda::outer_tiles(num_slots, on.slots.max_rank, args.width, args.dtype);
  args.num_splits = cuda::outer_splits(on.plan.max_items, tiles, on.slots.max_rank);
  const Tensor planes = workspace_of(cuda::outer_plane_bytes(tiles, args.num_splits, args.dtype), x);
  args.counters = on.counters;
  args.planes = planes.mutable_data_ptr();
  throw_unless_ok(cuda::outer(device_context(x.device()), args));
  return out;
}

/// body(first, last) for slices in groups that a launch takes.
template <class Body>
void in_groups(size_t slices, const Body& body) {
  for (size_t first = 0; first < slices; first += cuda::kMaxSlices)
    body(first, std::min(slices, first + cuda::kMaxSlices));
}

std::vector<cuda::Factor> factors_of(at::TensorList pools, size_t first, size_t last, bool out_first) {
  std::vector<cuda::Factor> factors;
  for (size_t i = first; i < last; ++i)
    factors.push_back(factor_of(pools[i], out_first));
  return factors;
}

}  // namespace

namespace {

void shrink_all(const DeviceBatch& on, const Pools& pools, const Tensor& x, const Tensor& v) {
  in_groups(pools.a.size(), [&](size_t first, size_t last) {
    const Tensor part = v.narrow(0, static_cast<int64_t>(first), static_cast<int64_t>(last - first));
    run_shrink(on, x, factors_of(pools.a, first, last, false), to_dtype(pools.a[0].scalar_type()), part, false);
  });
}

void expand_all(const DeviceBatch& on, const Pools& pools, const Tensor& v, const Tensor& y) {
  int64_t column = 0;
  in_groups(pools.b.size(), [&](size_t first, size_t last) {
    std::vector<int64_t> widths;
    for (size_t i = first; i < last; ++i)
      widths.push_back(pools.out_features(pools.b[i]));
    const Tensor part = v.narrow(0, static_cast<int64_t>(first), static_cast<int64_t>(last - first));
    run_expand(on, part, factors_of(pools.b, first, last, pools.out_first), to_dtype(pools.b[0].scalar_type()), widths,
               column, y, true);
    for (const int64_t width : widths)
      column += width;
  });
}

/// Beyond about two groups a slot, items of 64 rows read the factors less often.
bool decodes(const Pools& pools, const cuda::BatchPlan& plan, const Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  const bool is_half = dtype == at::kBFloat16 || dtype == at::kHalf;
  return is_half && pools.a[0].scalar_type() == dtype && pools.a.size() <= cuda::kMaxSlices &&
         plan.num_tokens <= 2 * cuda::kDecodeRows * plan.num_runs();
}

void run_decode(const Pools& pools, const SegmentPlan& plan, const Tensor& x, const Tensor& v, const Tensor& y) {
  // Up to so many rows, sorting them takes longer than a slot's factors that are read once more (not measured).
  constexpr int64_t kUnsortedRows = 32;
  const cuda::BatchPlan given = batch_plan(pools, plan, x);
  const bool unsorted = !given.is_grouped() && given.num_tokens <= kUnsortedRows;
  const int64_t groups = unsorted ? given.num_tokens : given.most_items(cuda::kDecodeRows);
  const DeviceBatch on = to_device(pools, plan, x, {unsorted ? 0 : cuda::kDecodeRows, cuda::decode_counters(groups)});
  cuda::DecodeArgs args;
  args.plan = on.plan;
  if (unsorted) args.row_slots = plan.slots;
  args.slots = on.slots;
  args.dtype = to_dtype(x.scalar_type());
  args.x = matrix(x);
  args.width = x.size(1);
  args.num_slices = static_cast<int>(pools.a.size());
  int64_t column = 0;
  for (size_t i = 0; i < pools.a.size(); ++i) {
    args.a[i] = factor_of(pools.a[i], false);
    args.b[i] = factor_of(pools.b[i], pools.out_first);
    args.widths[i] = pools.out_features(pools.b[i]);
    args.columns[i] = column;
    column += args.widths[i];
  }
  args.y = {y.mutable_data_ptr(), y.stride(0), 1};
  args.v = {v.mutable_data_ptr(), v.stride(0), v.stride(1)};
  const Tensor planes =
      workspace_of(cuda::decode_plane_bytes(groups, on.slots.max_rank, args.num_slices, args.width), x);
  args.counters = on.counters;
  args.planes = static_cast<float*>(planes.mutable_data_ptr());
  throw_unless_ok(cuda::decode(device_context(x.device()), args));
}

}  // namespace

void pools_shrink_cuda(const Pools& pools, const SegmentPlan& plan, const Tensor& x, const Tensor& v) {
  const c10::DeviceGuard guard(x.device());
  const Tensor rows = with_unit_columns(x);
  shrink_all(to_device(pools, plan, rows, {cuda::kItemRows, shrink_counters(pools, plan, rows)}), pools, rows, v);
}

void pools_expand_cuda(const Pools& pools, const SegmentPlan& plan, const Tensor& v, const Tensor& y) {
  const c10::DeviceGuard guard(y.device());
  expand_all(to_device(pools, plan, y, {}), pools, v, y);
}

void pools_forward_cuda(const Pools& pools, const SegmentPlan& plan, const Tensor& x, const Tensor& v,
                        const Tensor& y) {
  const c10::DeviceGuard guard(x.device());
  const Tensor rows = with_unit_columns(x);
  if (decodes(pools, batch_plan(pools, plan, rows), rows)) return run_decode(pools, plan, rows, v, y);
  const DeviceBatch on = to_device(pools, plan, rows, {cuda::kItemRows, shrink_counters(pools, plan, rows)});
  shrink_all(on, pools, rows, v);
  expand_all(on, pools, v, y);
}

PoolGradients pools_backward_cuda(const Pools& pools, const SegmentPlan& plan, const Tensor& dy, const Tensor& x,
                                  const Tensor& v, bool need_x, const std::vector<bool>& need_a,
                                  const std::vector<bool>& need_b) {
  const c10::DeviceGuard guard(dy.device());
  PoolGradients grads;
  const Tensor dy_rows = with_unit_columns(dy), x_rows = with_unit_columns(x);
  const int64_t widest = std::max(dy.size(1), x.size(1));
  const int64_t tiles = cuda::outer_tiles(pools.num_slots(), pools.max_rank(), widest, to_dtype(dy.scalar_type()));
  const DeviceBatch on =
      to_device(pools, plan, dy_rows, {cuda::kItemRows, std::max(shrink_counters(pools, plan, dy), tiles)});
  const Tensor g = new_v(dy, 1, dy.size(0), pools.max_rank());
  if (need_x) grads.dx = at::zeros({dy.size(0), pools.a[0].size(2)}, dy.options());
  int64_t column = 0;
  for (size_t i = 0; i < pools.a.size(); ++i) {
    const DType factor_dtype = to_dtype(pools.a[i].scalar_type());
    const int64_t out_features = pools.out_features(pools.b[i]);
    const Tensor dy_slice = dy_rows.narrow(1, column, out_features);
    if (need_x || need_a[i]) run_shrink(on, dy_slice, {factor_of(pools.b[i], pools.out_first)}, factor_dtype, g, true);
    if (need_x) run_expand(on, g, {factor_of(pools.a[i], false)}, factor_dtype, {x.size(1)}, 0, grads.dx, false);
    grads.da.push_back(need_a[i] ? run_outer(on, pools.num_slots(), g.select(0, 0), x_rows, pools.a[i], false, false)
                                 : Tensor());
    grads.db.push_back(need_b[i] ? run_outer(on, pools.num_slots(), v.select(0, static_cast<int64_t>(i)), dy_slice,
                                             pools.b[i], pools.out_first, true)
                                 : Tensor());
    column += out_features;
  }
  return grads;
}

}  // namespace pylora::binding

#endif  // PYLORA_WITH_CUDA
