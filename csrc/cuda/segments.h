// Low-rank products of many adapters in one launch, on CUDA: what lora, sgmv and bgmv are built on. One adapter is the
// case of one slot. With s the slot of row t, and rows of slot -1 left alone:
//   v[t]  = drop(x[t]) f_s^T                   shrink, rank_s numbers; times scaling_s where asked for
//   y[t] += drop(scaling_s * v[t] f_s)         expand
//   d_s   = sum over t of g[t]^T drop(x[t])    outer, [rank_s, width]
// In backward passes f is the other factor: g = shrink of dY with B, dX = expand of g with A.
//
// Numerics. 16-bit x with factors of its dtype pass through tensor cores in shrink, which multiplies them exactly. v and g
// are f32 and enter tensor cores as the sum of two bf16 (16 bits), and so do f16 and f32 factors in expand and x in outer;
// everything else is multiplied by FMA in f32 (f64 for f64). Sums are f32 (f64). y is read, added to and rounded once.
// Sums are taken in a fixed order for a given number of rows and splits: no float is added by an atomic, and a repeated
// launch gives the same bits.
//
// Launchers queue on context.stream. They wait for nothing, allocate nothing and read no device memory, so that a CUDA
// graph can hold them; sizes that change from batch to batch are read from device memory by the kernels. Rows, slots and
// strides are multiplied in 64 bits.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/matrix.h"
#include "common/philox.h"
#include "common/sizes.h"
#include "common/status.h"

namespace pylora::cuda {

/// Most rows of an item: the height of a block's tile.
constexpr int kItemRows = 64;
/// Most products of one x in one launch (q, k, v; gate, up).
constexpr int kMaxSlices = 4;

/// Positions [first, first + rows) of the plan's order, which share a slot.
struct alignas(16) Item {
  int32_t first, rows, slot, unused;
};

/// Which row belongs to which slot. Built once a batch (plan_segments) and used by every layer.
struct Plan {
  const Item* items = nullptr;         // device, [max_items]; null: all rows are slot 0's
  const int32_t* num_items = nullptr;  // device
  const int32_t* order = nullptr;      // device, position to row; null: they are the same
  int64_t max_items = 0;
  int64_t num_rows = 0;  // of x, v and y
};

constexpr Plan plan_of_one_slot(int64_t num_rows) {
  Plan plan;
  plan.max_items = (num_rows + kItemRows - 1) / kItemRows;
  plan.num_rows = num_rows;
  return plan;
}

/// A factor [slots, rank, width] with its strides in elements.
struct Factor {
  const void* data = nullptr;
  int64_t slot_stride = 0, rank_stride = 0, column_stride = 1;
};

/// Ranks and scalings of the slots.
struct Slots {
  const int32_t* ranks = nullptr;   // device, [slots]; null: max_rank for all
  const float* scalings = nullptr;  // device, [slots]; null: `scaling` for all
  int64_t max_rank = 0;
  double scaling = 1;
};

/// v of all slices: accumulators [slice, row, rank].
template <class Pointer>
struct LowRank {
  Pointer data = nullptr;
  int64_t slice_stride = 0, row_stride = 0;
};

struct ShrinkArgs {
  Plan plan;
  Slots slots;
  DType dtype = DType::f32;         // of x
  DType factor_dtype = DType::f32;  // of the factors
  ConstMatrix x;                    // [num_rows, width], column stride 1
  int64_t width = 0;
  int num_slices = 1;
  Factor factors[kMaxSlices];   // [slots, max_rank, width]
  LowRank<void*> v;             // out; rows of slot -1 and ranks beyond a slot's own are not written
  bool scaled = false;          // v is multiplied by the slot's scaling
  Dropout dropout;              // on x, counters are those of x's rows
  int num_splits = 1;           // parts of the width that blocks share: shrink_splits(...)
  int32_t* counters = nullptr;  // with several splits: shrink_counters(...), zero before the launch and after it
  void* planes = nullptr;       // shrink_plane_bytes(...)
};

struct ExpandArgs {
  Plan plan;
  Slots slots;
  DType dtype = DType::f32;         // of y
  DType factor_dtype = DType::f32;  // of the factors
  LowRank<const void*> v;
  int num_slices = 1;
  Factor factors[kMaxSlices];  // [slots, max_rank, widths[slice]]
  int64_t widths[kMaxSlices] = {};
  int64_t columns[kMaxSlices] = {};  // where a slice's columns of y begin
  MutableMatrix y;                   // [num_rows, sum of widths], column stride 1
  Dropout dropout;                   // on what is added, counters are those of y's rows and a slice's columns
};

/// Sums over the rows of each slot: d_s = sum over t of g[t]^T drop(x[t]), times scaling_s where asked for. Written whole
/// for every slot, zeros where it has no rows; ranks beyond a slot's own are not written.
struct OuterArgs {
  Plan plan;
  Slots slots;
  int64_t num_slots = 1;
  DType dtype = DType::f32;  // of x
  LowRank<const void*> g;    // [num_rows, max_rank], accumulators
  ConstMatrix x;             // [num_rows, width], column stride 1
  int64_t width = 0;
  bool scaled = false;
  Dropout dropout;               // on x
  DType out_dtype = DType::f32;  // of out: rounded once
  void* out = nullptr;           // [num_slots, max_rank, width] with these strides
  int64_t slot_stride = 0, rank_stride = 0, column_stride = 1;
  int num_splits = 1;           // parts of the items that blocks share: outer_splits(...)
  int32_t* counters = nullptr;  // with several splits: outer_tiles(...), zero before the launch and after it
  void* planes = nullptr;       // outer_plane_bytes(...)
};

/// Items of a plan from segments: segment i is positions [indptr[i], indptr[i + 1]) and slot slots[i]; slot -1 makes no
/// item.
struct PlanArgs {
  const int32_t* indptr = nullptr;  // device, [num_segments + 1]
  const int32_t* slots = nullptr;   // device, [num_segments]
  int64_t num_segments = 0;
  Item* items = nullptr;         // out, [max_items(num_rows, num_segments)]
  int32_t* num_items = nullptr;  // out
};

constexpr int64_t max_items(int64_t num_rows, int64_t num_segments) {
  const int64_t most = num_rows / kItemRows + num_segments;
  return most < num_rows ? most : num_rows;
}

/// Columns of x in one stage of the shrink kernels, and the least of a split.
constexpr int kStageColumns = 64, kSplitColumns = 512;
/// Planes take 8 bytes a rank and row, 16-bit x 2 a column: with 16 columns (in outer, rows) of a split for each rank they
/// cost at most a quarter of what is split.
constexpr int64_t kSplitPerRank = 16;
/// Ranks, of all slices together, of one shrink tile.
constexpr int kTileRanks = 64;

constexpr int64_t shrink_rank_tiles(int64_t max_rank, int num_slices) {
  return (max_rank * num_slices + kTileRanks - 1) / kTileRanks;
}

/// Blocks that keep the largest GPUs of today busy. A constant, so that splits, and with them the last bits of v, are the
/// same on every GPU.
constexpr int64_t kWantedBlocks = 264;

/// As many parts as keep a GPU busy, from one to `most`.
constexpr int splits_of(int64_t blocks, int64_t most) {
  const int64_t wanted = blocks > 0 ? (kWantedBlocks + blocks - 1) / blocks : 1;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

/// Parts that the width is cut into, so that a few rows keep a GPU busy too. Depends on the shape alone.
constexpr int shrink_splits(int64_t max_items, int64_t max_rank, int num_slices, int64_t width) {
  const int64_t ranks = max_rank * num_slices < kTileRanks ? max_rank * num_slices : kTileRanks;
  const int64_t least = kSplitPerRank * ranks > kSplitColumns ? kSplitPerRank * ranks : kSplitColumns;
  return splits_of(max_items * shrink_rank_tiles(max_rank, num_slices), (width + least - 1) / least);
}

/// A counter for each tile whose splits are summed.
constexpr int64_t shrink_counters(int64_t max_items, int64_t rank_tiles) { return max_items * rank_tiles; }
constexpr int64_t shrink_plane_bytes(int64_t max_items, int64_t rank_tiles, int num_splits, DType dtype) {
  if (num_splits <= 1) return 0;
  return max_items * rank_tiles * num_splits * kItemRows * kTileRanks * dtype_bytes(accumulator_dtype(dtype));
}

/// A tile of outer: ranks by columns, of 16-bit and of other x.
constexpr int kOuterRanks = 64, kOuterColumns = 128, kOuterFmaColumns = 64;

constexpr int64_t outer_tiles(int64_t num_slots, int64_t max_rank, int64_t width, DType dtype) {
  const int columns = dtype_bytes(dtype) == 2 ? kOuterColumns : kOuterFmaColumns;
  return num_slots * ((max_rank + kOuterRanks - 1) / kOuterRanks) * ((width + columns - 1) / columns);
}
/// Parts that the items are cut into.
constexpr int outer_splits(int64_t max_items, int64_t tiles, int64_t max_rank) {
  constexpr int64_t kLeastItems = 4;
  const int64_t ranks = max_rank < kOuterRanks ? max_rank : kOuterRanks;
  const int64_t items = kSplitPerRank * ranks / kItemRows;
  const int64_t least = items > kLeastItems ? items : kLeastItems;
  return splits_of(tiles, (max_items + least - 1) / least);
}

constexpr int64_t outer_plane_bytes(int64_t tiles, int num_splits, DType dtype) {
  if (num_splits <= 1) return 0;
  return tiles * num_splits * kOuterRanks * kOuterColumns * dtype_bytes(accumulator_dtype(dtype));
}

/// Most rows of a group in decode.
constexpr int kDecodeRows = 8;

/// shrink and expand in one launch for few rows a slot, of bf16 or f16 throughout. Groups of rows are a plan's items (of at
/// most kDecodeRows rows), or neighbours where one slot serves all, or single rows with a slot each.
struct DecodeArgs {
  Plan plan;                           // max_items: groups
  const int32_t* row_slots = nullptr;  // device, [num_rows]: a group a row; null: the plan's
  Slots slots;
  DType dtype = DType::bf16;  // of everything but v
  ConstMatrix x;              // [num_rows, width], column stride 1
  int64_t width = 0;
  int num_slices = 1;
  Factor a[kMaxSlices];  // [slots, max_rank, width], column stride 1
  Factor b[kMaxSlices];  // [slots, max_rank, widths[slice]]
  int64_t widths[kMaxSlices] = {};
  int64_t columns[kMaxSlices] = {};
  MutableMatrix y;
  LowRank<void*> v;             // out, f32; null: not wanted
  int32_t* counters = nullptr;  // decode_counters(...), zero before the launch and after it
  float* planes = nullptr;      // decode_plane_bytes(...)
};

/// Columns of x that a block multiplies at once.
constexpr int kDecodeSplit = 512;
constexpr int64_t decode_groups(int64_t num_rows) { return (num_rows + kDecodeRows - 1) / kDecodeRows; }
constexpr int64_t decode_splits(int64_t width) { return (width + kDecodeSplit - 1) / kDecodeSplit; }
/// A ticket, the blocks that are done, and the arrivals of each group.
constexpr int64_t decode_counters(int64_t groups) { return 2 + groups; }
constexpr int64_t decode_plane_bytes(int64_t groups, int64_t max_rank, int num_slices, int64_t width) {
  return decode_splits(width) * groups * kDecodeRows * max_rank * num_slices * static_cast<int64_t>(sizeof(float));
}

Status plan_segments(const Context& context, const PlanArgs& args);
Status shrink(const Context& context, const ShrinkArgs& args);
Status expand(const Context& context, const ExpandArgs& args);
Status decode(const Context& context, const DecodeArgs& args);
Status outer(const Context& context, const OuterArgs& args);

}  // namespace pylora::cuda
