#if defined(PYLORA_WITH_CUDA)

#include "binding/pools_cuda.h"

#include <c10/core/DeviceGuard.h>

#include <cstring>

#include "binding/segments.h"
#include "cuda/segments.h"

namespace pylora::binding {
namespace {

/// Items, order, ranks and scalings of a call in device memory.
struct DevicePlan {
  Tensor words;  // int32, owns what follows
  cuda::Plan plan;
  cuda::Slots slots;
};

/// Segments cut into items of at most `item_rows` rows; rows without an adapter are in none.
std::vector<cuda::Item> items_of(const SegmentPlan& plan, int64_t item_rows) {
  std::vector<cuda::Item> items;
  for (int64_t s = 0; s < plan.num_segments; ++s) {
    const int64_t end = plan.begin_of(s + 1);
    if (plan.slots[s] < 0) continue;
    for (int64_t first = plan.begin_of(s); first < end; first += item_rows)
      items.push_back(
          {static_cast<int32_t>(first), static_cast<int32_t>(std::min(item_rows, end - first)), plan.slots[s], 0});
  }
  return items;
}

DevicePlan to_device(const Pools& pools, const SegmentPlan& plan, int64_t num_rows, int64_t item_rows,
                     const Tensor& like) {
  const std::vector<cuda::Item> items = items_of(plan, item_rows);
  const int64_t item_words = static_cast<int64_t>(items.size()) * 4, positions = plan.num_positions();
  const int64_t num_slots = pools.num_slots();
  const Tensor host = at::empty({item_words + 4 + positions + 2 * num_slots}, at::TensorOptions().dtype(at::kInt));
  int32_t* words = host.mutable_data_ptr<int32_t>();
  std::memcpy(words, items.data(), items.size() * sizeof(cuda::Item));
  words[item_words] = static_cast<int32_t>(items.size());
  int32_t* order = words + item_words + 4;
  for (int64_t p = 0; p < positions; ++p)
    order[p] = static_cast<int32_t>(plan.token(p));
  std::memcpy(order + positions, pools.ranks.const_data_ptr<int32_t>(), static_cast<size_t>(num_slots) * 4);
  if (pools.scalings)
    std::memcpy(order + positions + num_slots, pools.scalings->const_data_ptr<float>(),
                static_cast<size_t>(num_slots) * 4);
  DevicePlan result;
  result.words = host.to(like.device());
  const int32_t* on_device = result.words.const_data_ptr<int32_t>();
  result.plan.items = reinterpret_cast<const cuda::Item*>(on_device);
  result.plan.num_items = on_device + item_words;
  result.plan.order = on_device + item_words + 4;
  result.plan.max_items = static_cast<int64_t>(items.size());
  result.plan.num_rows = num_rows;
  result.slots.ranks = result.plan.order + positions;
  if (pools.scalings) result.slots.scalings = reinterpret_cast<const float*>(result.plan.order + positions + num_slots);
  result.slots.max_rank = pools.max_rank();
  return result;
}

cuda::Factor factor_of(const Tensor& pool, bool out_first) {
  return {pool.const_data_ptr(), pool.stride(0), pool.stride(out_first ? 2 : 1), pool.stride(out_first ? 1 : 2)};
}

Tensor counters_of(int64_t count, const Tensor& like) { return at::zeros({count}, like.options().dtype(at::kInt)); }

/// v = x f^T of a group of slices that read the same columns of x.
void run_shrink(const DevicePlan& on, const Tensor& x, const std::vector<cuda::Factor>& factors, DType factor_dtype,
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
  const Tensor counters = counters_of(cuda::shrink_counters(on.plan.max_items, tiles), x);
  const Tensor planes =
      workspace_of(cuda::shrink_plane_bytes(on.plan.max_items, tiles, args.num_splits, args.dtype), x);
  args.counters = counters.mutable_data_ptr<int32_t>();
  args.planes = planes.mutable_data_ptr();
  throw_unless_ok(cuda::shrink(device_context(x.device()), args));
}

void run_expand(const DevicePlan& on, const Tensor& v, const std::vector<cuda::Factor>& factors, DType factor_dtype,
                const std::vector<int64_t>& widths, int64_t column, const Tensor& y, bool scaled) {
  cuda::ExpandArgs args;
  args.plan = on.plan;
  args.slots = on.slots;
  if (!scaled) args.slots.scalings = nullptr;
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

Tensor run_outer(const DevicePlan& on, int64_t num_slots, const Tensor& g, const Tensor& x, const Tensor& like,
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
  const Tensor counters = counters_of(tiles, x);
  const Tensor planes = workspace_of(cuda::outer_plane_bytes(tiles, args.num_splits, args.dtype), x);
  args.counters = counters.mutable_data_ptr<int32_t>();
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

void pools_shrink_cuda(const Pools& pools, const SegmentPlan& plan, const Tensor& x, const Tensor& v) {
  const c10::DeviceGuard guard(x.device());
  const Tensor rows = with_unit_columns(x);
  const DevicePlan on = to_device(pools, plan, x.size(0), cuda::kItemRows, x);
  in_groups(pools.a.size(), [&](size_t first, size_t last) {
    const Tensor part = v.narrow(0, static_cast<int64_t>(first), static_cast<int64_t>(last - first));
    run_shrink(on, rows, factors_of(pools.a, first, last, false), to_dtype(pools.a[0].scalar_type()), part, false);
  });
}

void pools_expand_cuda(const Pools& pools, const SegmentPlan& plan, const Tensor& v, const Tensor& y) {
  const c10::DeviceGuard guard(y.device());
  const DevicePlan on = to_device(pools, plan, y.size(0), cuda::kItemRows, y);
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

bool pools_decode_cuda(const Pools& pools, const SegmentPlan& plan, const Tensor& x, const Tensor& v, const Tensor& y) {
  const at::ScalarType dtype = x.scalar_type();
  const bool is_half = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (!is_half || pools.a[0].scalar_type() != dtype || pools.a.size() > cuda::kMaxSlices) return false;
  // Beyond about two groups a slot, items of 64 rows read the factors less often.
  if (plan.num_positions() > 2 * cuda::kDecodeRows * plan.num_segments) return false;
  const c10::DeviceGuard guard(x.device());
  const Tensor rows = with_unit_columns(x);
  const DevicePlan on = to_device(pools, plan, x.size(0), cuda::kDecodeRows, x);
  cuda::DecodeArgs args;
  args.plan = on.plan;
  args.slots = on.slots;
  args.dtype = to_dtype(dtype);
  args.x = matrix(rows);
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
  const Tensor counters = counters_of(cuda::decode_counters(on.plan.max_items), x);
  const Tensor planes =
      workspace_of(cuda::decode_plane_bytes(on.plan.max_items, on.slots.max_rank, args.num_slices, args.width), x);
  args.counters = counters.mutable_data_ptr<int32_t>();
  args.planes = static_cast<float*>(planes.mutable_data_ptr());
  throw_unless_ok(cuda::decode(device_context(x.device()), args));
  return true;
}

PoolGradients pools_backward_cuda(const Pools& pools, const SegmentPlan& plan, const Tensor& dy, const Tensor& x,
                                  const Tensor& v, bool need_x, const std::vector<bool>& need_a,
                                  const std::vector<bool>& need_b) {
  const c10::DeviceGuard guard(dy.device());
  PoolGradients grads;
  const Tensor dy_rows = with_unit_columns(dy), x_rows = with_unit_columns(x);
  const DevicePlan on = to_device(pools, plan, dy.size(0), cuda::kItemRows, dy);
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
