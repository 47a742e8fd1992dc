// What a call over many adapters does on the host before its kernels: the plan and the adapters that the caller gave, in
// the device's memory. Nothing waits for the device and nothing is read from it.
#pragma once

#include <cstring>

#include "cpu/segments.h"
#include "cuda/segments.h"

namespace pylora::cuda {

constexpr int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }

/// Collects values of the host and sends them, one behind the other, to device memory at `to`, in as few launches as they
/// take. The first sets `num_zeros` numbers at `zeros` to 0.
class Upload {
 public:
  Upload(const Context& context, void* to, int32_t* zeros, int64_t num_zeros) : context_(context) {
    parcel_.to = to;
    parcel_.zeros = zeros;
    parcel_.num_zeros = num_zeros;
  }

  /// Where the bytes will be, aligned to 16; they take padded(bytes).
  const void* add(const void* from, int64_t bytes) {
    const void* const at = end();
    for (int64_t sent = 0; sent < bytes;) {
      const int64_t room = kParcelBytes - parcel_.bytes, left = bytes - sent, count = left < room ? left : room;
      std::memcpy(parcel_.data + parcel_.bytes, static_cast<const char*>(from) + sent, static_cast<size_t>(count));
      parcel_.bytes = padded(parcel_.bytes + count);
      sent += count;
      if (parcel_.bytes == kParcelBytes) send_parcel();
    }
    return at;
  }

  Status finish() {
    send_parcel();
    return status_;
  }

 private:
  void* end() const { return static_cast<char*>(parcel_.to) + parcel_.bytes; }

  void send_parcel() {
    if (status_.is_ok()) status_ = send(context_, parcel_);
    parcel_.to = end();
    parcel_.bytes = parcel_.num_zeros = 0;
  }

  Context context_;
  Status status_;
  Parcel parcel_;
};

/// A plan as a caller gives it.
struct BatchPlan {
  SegmentPlan given;
  int64_t num_tokens = 0, num_slots = 0;

  int64_t num_rows() const { return num_tokens / given.tokens_per_row; }
  /// A slot for each row, in no order.
  bool is_grouped() const { return given.indptr != nullptr; }
  /// Runs of rows that may be items of their own.
  int64_t num_runs() const { return is_grouped() ? given.num_segments : num_slots; }
  int64_t most_items(int item_rows) const { return max_items(num_tokens, num_runs(), item_rows); }
};

/// Memory that Upload needs for the plan.
inline int64_t uploaded_bytes(const BatchPlan& plan) {
  if (plan.given.on_device) return 0;
  const int64_t order = plan.given.order ? padded(plan.num_rows() * 4) : 0;
  return padded((plan.given.num_segments + 1) * 4) + padded(plan.given.num_segments * 4) + order;
}

/// The plan with addresses of the device.
inline BatchPlan on_device(BatchPlan plan, Upload& upload) {
  SegmentPlan& given = plan.given;
  if (given.on_device) return plan;
  const auto add = [&](const int32_t* from, int64_t count) {
    return static_cast<const int32_t*>(upload.add(from, count * 4));
  };
  given.indptr = add(given.indptr, given.num_segments + 1);
  given.slots = add(given.slots, given.num_segments);
  if (given.order) given.order = add(given.order, plan.num_rows());
  given.on_device = true;
  return plan;
}

/// Memory of queue_plan.
inline int64_t plan_bytes(const BatchPlan& plan, int item_rows) {
  const bool moves_sequences = plan.given.order && plan.given.tokens_per_row > 1;
  const int64_t rows = !plan.is_grouped() || moves_sequences ? padded(plan.num_tokens * 4) : 0;
  const int64_t starts = plan.is_grouped() ? 0 : padded(plan.num_slots * 4);
  return plan.most_items(item_rows) * static_cast<int64_t>(sizeof(Item)) + 16 + rows + starts;
}

/// Queues the kernel that makes the plan of an on_device plan. memory: plan_bytes, aligned to 16.
inline Status queue_plan(const Context& context, const BatchPlan& plan, int item_rows, void* memory, Plan* made) {
  PlanArgs args;
  args.num_rows = plan.num_tokens;
  args.num_segments = plan.given.num_segments;
  args.num_slots = plan.num_slots;
  args.item_rows = item_rows;
  args.indptr = plan.given.indptr;
  args.slots = plan.given.slots;
  args.tokens_per_row = plan.given.tokens_per_row;
  args.order = plan.given.order;
  args.max_items = plan.most_items(item_rows);
  args.items = static_cast<Item*>(memory);
  args.num_items = reinterpret_cast<int32_t*>(args.items + args.max_items);
  int32_t* const rows = args.num_items + 4;
  if (!plan.is_grouped() || (args.order && args.tokens_per_row > 1)) args.rows = rows;
  args.starts = rows + padded(args.num_rows * 4) / 4;
  made->items = args.items;
  made->num_items = args.num_items;
  made->order = args.rows ? args.rows : args.order;
  made->max_items = args.max_items;
  made->num_rows = args.num_rows;
  return plan.is_grouped() ? plan_segments(context, args) : group_rows(context, args);
}

/// A factor whose places are entries: its layout is what all of them have.
class FactorLayout {
 public:
  explicit FactorLayout(DType dtype) : bytes_(dtype_bytes(dtype)) {}

  void add(const Place<const void*>& place) {
    const bool starts_aligned = reinterpret_cast<uintptr_t>(place.data) % 16 == 0;
    along_ &= place.column_stride == 1;
    across_ &= place.rank_stride == 1;
    rows_aligned_ &= starts_aligned && place.rank_stride * bytes_ % 16 == 0;
    columns_aligned_ &= starts_aligned && place.column_stride * bytes_ % 16 == 0;
  }

  /// places: in device memory.
  Factor factor(const Place<const void*>* places) const {
    constexpr int64_t kAligned = 16, kUnaligned = 3;
    Factor factor;
    factor.places = places;
    factor.column_stride = along_ ? 1 : across_ && columns_aligned_ ? kAligned : kUnaligned;
    factor.rank_stride = !along_ && across_ ? 1 : along_ && rows_aligned_ ? kAligned : kUnaligned;
    return factor;
  }

 private:
  int64_t bytes_;
  bool along_ = true, across_ = true, rows_aligned_ = true, columns_aligned_ = true;
};

}  // namespace pylora::cuda
