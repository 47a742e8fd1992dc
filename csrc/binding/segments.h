// What the ops over many adapters share on torch's side: stacked pools and plans, checked and handed to
// cpu/segments.h.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "binding/checks.h"
#include "binding/context.h"
#include "binding/dense.h"
#include "binding/dtype.h"
#include "binding/pools_cuda.h"
#include "binding/status.h"
#include "cpu/segments.h"

namespace pylora::binding {

using at::Tensor;

/// Contiguous int32, one dimension; on the CPU, or on the CUDA device of `like`, the activations.
inline void check_indices(const char* op, const char* name, const Tensor& t, int64_t length, const Tensor& like) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, op, ": ", name, ": expected int32, got ", t.scalar_type());
  Checks(op).shape(name, t, {length});
  TORCH_CHECK_VALUE((t.is_cpu() || t.device() == like.device()) && t.is_contiguous(), op, ": ", name,
                    ": expected a contiguous tensor on the CPU or on ", like.device(), ", got ", t.device());
}

/// What a check of values reads: those on a device only with PYLORA_CHECK=1, since that waits for the device; else
/// undefined.
inline Tensor values_to_check(const Tensor& t) {
  static const bool wanted = [] {
    const char* const value = std::getenv("PYLORA_CHECK");
    return value && std::strcmp(value, "1") == 0;
  }();
  return t.is_cpu() ? t : wanted ? t.cpu() : Tensor();
}

inline void check_slots(const char* op, const char* name, const Tensor& given, int64_t num_slots) {
  const Tensor slots = values_to_check(given);
  if (!slots.defined()) return;
  const int32_t* p = slots.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < slots.numel(); ++i) {
    TORCH_CHECK_VALUE(p[i] >= -1 && p[i] < num_slots, op, ": ", name, ": expected slots from -1 to ", num_slots - 1,
                      ", got ", p[i], " at ", i);
  }
}

/// Row offsets from 0 to num_rows, none smaller than the one before.
inline void check_indptr(const char* op, const char* name, const Tensor& given, int64_t num_segments, int64_t num_rows,
                         const Tensor& like) {
  check_indices(op, name, given, num_segments + 1, like);
  const Tensor indptr = values_to_check(given);
  if (!indptr.defined()) return;
  const int32_t* p = indptr.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(p[0] == 0 && p[num_segments] == num_rows, op, ": ", name, ": expected offsets from 0 to the ",
                    num_rows, " rows, got ", p[0], " to ", p[num_segments]);
  for (int64_t i = 0; i < num_segments; ++i)
    TORCH_CHECK_VALUE(p[i] <= p[i + 1], op, ": ", name, ": expected offsets that do not fall, got ", p[i], " before ",
                      p[i + 1]);
}

/// One factor of all slots. Addresses are counted here: a tensor for each slot would take longer than a small batch.
struct StackedFactor {
  StackedFactor(const Tensor& pool, int64_t row_dim, int64_t column_dim)
      : dtype(to_dtype(pool.scalar_type())),
        first{pool.const_data_ptr(), pool.stride(row_dim), pool.stride(column_dim)},
        slot_bytes(pool.stride(0) * pool.element_size()) {}

  ConstMatrix of_slot(int64_t slot) const {
    return {static_cast<const char*>(first.data) + slot * slot_bytes, first.row_stride, first.column_stride};
  }

  DType dtype;
  ConstMatrix first;
  int64_t slot_bytes;
};

/// Stacked factors of all slots, for one or several products of the same input ("slices").
struct Pools {
  const char* op;
  at::TensorList a, b;     // each slice: [num_slots, max_rank, in]; [num_slots, max_rank, out], or out before max_rank
  const Tensor& ranks;     // int32 [num_slots]
  const Tensor* scalings;  // f32 [num_slots]; null where nothing is expanded
  bool out_first = false;

  int64_t num_slots() const { return ranks.size(0); }
  int64_t out_features(const Tensor& b_pool) const { return b_pool.size(out_first ? 1 : 2); }

  /// `like`: a tensor of the activations' device. Empty lists are passed over.
  void check(const Tensor& like) const {
    check_indices(op, "ranks", ranks, -1, like);
    if (scalings) {
      TORCH_CHECK_TYPE(scalings->scalar_type() == at::kFloat, op, ": scalings: expected float32, got ",
                       scalings->scalar_type());
      Checks(op).shape("scalings", *scalings, {num_slots()});
      TORCH_CHECK_VALUE(scalings->is_contiguous(), op, ": scalings: expected a contiguous tensor");
      Checks(op).same_device("scalings", *scalings, "ranks", ranks);
    }
    TORCH_CHECK_VALUE(!a.empty() || !b.empty(), op, ": a_pool: expected at least one pool, got none");
    if (!a.empty() && !b.empty())
      TORCH_CHECK_VALUE(a.size() == b.size(), op, ": b_pool: expected as many pools as a_pool, ", a.size(), ", got ",
                        b.size());
    const Tensor& first = a.empty() ? b[0] : a[0];
    TORCH_CHECK_VALUE(first.dim() == 3, op, ": ", a.empty() ? "b_pool" : "a_pool",
                      ": expected three dimensions, got shape ", first.sizes());
    const int64_t max_rank = a.empty() && out_first ? first.size(2) : first.size(1);
    for (const Tensor& pool : a)
      check_pool("a_pool", pool, {num_slots(), max_rank, a[0].size(2)}, first, like);
    for (const Tensor& pool : b) {
      if (out_first) {
        check_pool("b_pool", pool, {num_slots(), -1, max_rank}, first, like);
      } else {
        check_pool("b_pool", pool, {num_slots(), max_rank, -1}, first, like);
      }
    }
    const Tensor checked = values_to_check(ranks);
    const int32_t* rank = checked.defined() ? checked.const_data_ptr<int32_t>() : nullptr;
    for (int64_t i = 0; rank && i < num_slots(); ++i)
      TORCH_CHECK_VALUE(rank[i] >= 0 && rank[i] <= max_rank, op, ": ranks: expected 0 to ", max_rank, ", got ", rank[i],
                        " for slot ", i);
  }

  int64_t max_rank() const { return !a.empty() ? a[0].size(1) : b[0].size(out_first ? 2 : 1); }

  /// The slots of one slice.
  std::vector<SegmentSlot> slots(size_t slice) const {
    std::vector<SegmentSlot> result(static_cast<size_t>(num_slots()));
    std::optional<StackedFactor> a_factors, b_factors;
    if (!a.empty()) a_factors.emplace(a[slice], 1, 2);
    if (!b.empty()) b_factors.emplace(b[slice], out_first ? 1 : 2, out_first ? 2 : 1);
    for (int64_t i = 0; i < num_slots(); ++i) {
      SegmentSlot& slot = result[static_cast<size_t>(i)];
      slot.rank = ranks.const_data_ptr<int32_t>()[i];
      if (scalings) slot.scaling = scalings->const_data_ptr<float>()[i];
      if (a_factors) {
        slot.dtype = a_factors->dtype;
        slot.a = a_factors->of_slot(i);
      }
      if (b_factors) {
        slot.dtype = b_factors->dtype;
        slot.b = b_factors->of_slot(i);
      }
    }
    return result;
  }

 private:
  void check_pool(const char* name, const Tensor& pool, at::IntArrayRef shape, const Tensor& first,
                  const Tensor& like) const {
    const Checks check(op);
    check.shape(name, pool, shape);
    check.kernel_dtype(name, pool);
    check.same_dtype(name, pool, "the first pool", first);
    check.same_device(name, pool, "x", like);
  }
};

/// Rows of activations for the kernels: [num_tokens, width], neighbouring columns side by side.
inline void check_rows(const char* op, const char* name, const Tensor& t, int64_t num_tokens, int64_t width) {
  const Checks check(op);
  check.shape(name, t, {num_tokens, width});
  check.kernel_dtype(name, t);
}

inline void check_written(const char* op, const Tensor& y) {
  TORCH_CHECK_VALUE(y.size(1) <= 1 || y.stride(1) == 1, op, ": y: expected a column stride of 1, got ", y.stride(1));
  at::assert_no_internal_overlap(y);
}

inline Tensor new_v(const Tensor& like, int64_t slices, int64_t num_tokens, int64_t max_rank) {
  return at::empty({slices, num_tokens, max_rank}, like.options().dtype(accumulator_type(like.scalar_type())));
}

inline MutableMatrix columns_from(const Tensor& y, int64_t column) {
  return {static_cast<char*>(y.mutable_data_ptr()) + column * y.element_size(), y.stride(0), 1};
}

/// `launch` for each slice in turn. v: [slices, num_tokens, max_rank]; x: null where nothing is shrunk, y: where nothing
/// is expanded, the slices' columns side by side.
inline void for_each_slice(const Pools& pools, const SegmentPlan& plan, const Tensor* x, const Tensor& v,
                           const Tensor* y, Status (*launch)(const Context&, const SegmentForward&)) {
  const Tensor rows = x ? with_unit_columns(*x) : Tensor();
  int64_t column = 0;
  for (size_t slice = 0; slice < std::max(pools.a.size(), pools.b.size()); ++slice) {
    const std::vector<SegmentSlot> slots = pools.slots(slice);
    SegmentForward args;
    args.shape.v_stride = v.size(2);
    args.shape.dtype = to_dtype((x ? *x : *y).scalar_type());
    args.plan = plan;
    args.slots = slots.data();
    args.v = v.select(0, static_cast<int64_t>(slice)).mutable_data_ptr();
    if (x) {
      args.shape.in_features = x->size(1);
      args.x = matrix(rows);
    }
    if (y) {
      args.shape.out_features = pools.out_features(pools.b[slice]);
      args.y = columns_from(*y, column);
      column += args.shape.out_features;
    }
    throw_unless_ok(launch(cpu_context(), args));
  }
}

/// v of all slices; tokens without an adapter, and ranks beyond a slot's own, are not written.
inline void pools_shrink(const Pools& pools, const SegmentPlan& plan, const Tensor& x, const Tensor& v) {
#if defined(PYLORA_WITH_CUDA)
  if (!x.is_cpu()) return pools_shrink_cuda(pools, plan, x, v);
#endif
  for_each_slice(pools, plan, &x, v, nullptr, segments_shrink_cpu);
}

/// Adds to y, the slices' columns side by side.
inline void pools_expand(const Pools& pools, const SegmentPlan& plan, const Tensor& v, const Tensor& y) {
#if defined(PYLORA_WITH_CUDA)
  if (!y.is_cpu()) return pools_expand_cuda(pools, plan, v, y);
#endif
  for_each_slice(pools, plan, nullptr, v, &y, segments_expand_cpu);
}

/// Both, with one turn of the threads a slice: a thread expands what it has shrunk.
inline void pools_forward(const Pools& pools, const SegmentPlan& plan, const Tensor& x, const Tensor& v,
                          const Tensor& y) {
#if defined(PYLORA_WITH_CUDA)
  if (!x.is_cpu()) return pools_forward_cuda(pools, plan, x, v, y);
#endif
  for_each_slice(pools, plan, &x, v, &y, segments_forward_cpu);
}

struct PoolGradients {
  Tensor dx;
  std::vector<Tensor> da, db;
};

/// Gradients of what pools_shrink and pools_expand add to y; dx starts from zero.
inline PoolGradients pools_backward(const Pools& pools, const SegmentPlan& plan, const Tensor& dy, const Tensor& x,
                                    const Tensor& v, bool need_x, const std::vector<bool>& need_a,
                                    const std::vector<bool>& need_b) {
#if defined(PYLORA_WITH_CUDA)
  if (!dy.is_cpu()) return pools_backward_cuda(pools, plan, dy, x, v, need_x, need_a, need_b);
#endif
  PoolGradients grads;
  const auto sums = dy.options().dtype(accumulator_type(dy.scalar_type()));
  const int64_t in_features = pools.a[0].size(2), max_rank = pools.max_rank();
  const Tensor dy_rows = with_unit_columns(dy), x_rows = with_unit_columns(x);
  const Tensor g = at::empty({dy.size(0), max_rank}, sums);
  if (need_x) grads.dx = at::zeros({dy.size(0), in_features}, dy.options());
  int64_t column = 0;
  for (size_t slice = 0; slice < pools.a.size(); ++slice) {
    const std::vector<SegmentSlot> slots = pools.slots(slice);
    const int64_t out_features = pools.out_features(pools.b[slice]);
    const Tensor da = need_a[slice] ? at::zeros({pools.num_slots(), max_rank, in_features}, sums) : Tensor();
    const Tensor db = need_b[slice] ? at::zeros({pools.num_slots(), max_rank, out_features}, sums) : Tensor();
    std::vector<void*> da_slots, db_slots;
    for (int64_t i = 0; i < pools.num_slots(); ++i) {
      if (da.defined()) da_slots.push_back(da.select(0, i).mutable_data_ptr());
      if (db.defined()) db_slots.push_back(db.select(0, i).mutable_data_ptr());
    }
    SegmentBackward args;
    args.shape = {in_features, out_features, max_rank, to_dtype(dy.scalar_type())};
    args.plan = plan;
    args.slots = slots.data();
    args.dy = matrix(dy_rows.narrow(1, column, out_features));
    args.x = matrix(x_rows);
    args.v = v.select(0, static_cast<int64_t>(slice)).const_data_ptr();
    if (need_x) args.dx = columns_from(grads.dx, 0);
    args.g = g.mutable_data_ptr();
    args.da = da.defined() ? da_slots.data() : nullptr;
    args.db = db.defined() ? db_slots.data() : nullptr;
    throw_unless_ok(segments_backward_cpu(cpu_context(), args));
    grads.da.push_back(da.defined() ? da.to(pools.a[slice].scalar_type()) : Tensor());
    const Tensor laid_out = db.defined() && pools.out_first ? db.transpose(1, 2).contiguous() : db;
    grads.db.push_back(laid_out.defined() ? laid_out.to(pools.b[slice].scalar_type()) : Tensor());
    column += out_features;
  }
  return grads;
}

}  // namespace pylora::binding
