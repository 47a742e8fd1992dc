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

/// Whether the build has machine code, or PTX to make some of, for the current device.
bool runs_here();

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

/// Where a slot's factor lies: element (rank, column) is rank * rank_stride + column * column_stride elements further.
template <class Pointer>
struct Place {
  Pointer data = nullptr;
  int64_t rank_stride = 0, column_stride = 1;
};

/// A slot whose factors lie where its adapter keeps them, in device memory (upload).
struct alignas(16) SlotEntry {
  Place<const void*> a, b;  // [rank, in_features], [rank, out_features]
  Place<void*> da, db;      // their gradients
  int32_t rank = 0;
  uint32_t threshold = 0;  // of dropout
  double scaling = 1, keep_scale = 1;
};

/// A factor [slots, rank, width] with its strides in elements.
struct Factor {
  const void* data = nullptr;
  int64_t slot_stride = 0, rank_stride = 0, column_stride = 1;
  /// Device: the Place of slot 0, those of the others sizeof(SlotEntry) bytes apart. The fields above are then those of
  /// no slot: launchers choose a kernel by them, so that they are aligned only if all slots' are (cuda/batch.h).
  const void* places = nullptr;
};

/// Ranks, scalings and dropout of the slots.
struct Slots {
  const int32_t* ranks = nullptr;      // device, [slots]; null: max_rank for all
  const float* scalings = nullptr;     // device, [slots]; null: `scaling` for all
  const SlotEntry* entries = nullptr;  // device, [slots], in place of the two, and of an active dropout's threshold
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
  bool scaled = true;                // what is added is multiplied by the slot's scaling
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
  const void* places = nullptr;  // as in Factor, in place of the four
  int num_splits = 1;            // parts of the items that blocks share: outer_splits(...)
  int32_t* counters = nullptr;   // with several splits: outer_tiles(...), zero before the launch and after it
  void* planes = nullptr;        // outer_plane_bytes(...)
};

/// Items of a plan from segments of neighbouring tokens, or from a slot for each row. Slots outside [0, num_slots) make no
/// item, offsets beyond the rows are cut and items beyond max_items are not written: what the device is given cannot make
/// it write elsewhere.
struct PlanArgs {
  int64_t num_rows = 0, num_segments = 0, num_slots = 0;
  int item_rows = kItemRows;  // most rows of an item
  const int32_t* indptr =
      nullptr;  // device, [num_segments + 1]: segment i is the sequences from indptr[i] to indptr[i + 1]
  const int32_t* slots = nullptr;  // device, [num_segments]; in group_rows [num_rows]
  int64_t tokens_per_row = 1;      // neighbouring rows that `order` moves together (a sequence)
  const int32_t* order = nullptr;  // device, [num_rows / tokens_per_row], position to sequence; null: they are the same
  int32_t* rows = nullptr;    // out, [num_rows], position to row: where tokens_per_row > 1 and order is given, and in
                              // group_rows
  int32_t* starts = nullptr;  // group_rows: scratch, [num_slots]
  Item* items = nullptr;      // out, [max_items]
  int64_t max_items = 0;      // max_items(num_rows, num_segments or, in group_rows, num_slots, item_rows)
  int32_t* num_items = nullptr;  // out
};

constexpr int64_t max_items(int64_t num_rows, int64_t num_segments, int item_rows = kItemRows) {
  const int64_t most = num_rows / item_rows + num_segments;
  return most < num_rows ? most : num_rows;
}

/// Values of the host that a launch carries as its arguments, so that nothing waits and a captured graph keeps them.
constexpr int64_t kParcelBytes = 3840;
struct Parcel {
  void* to = nullptr;        // device, aligned to 16
  int64_t bytes = 0;         // a multiple of 16
  int32_t* zeros = nullptr;  // device: set to 0
  int64_t num_zeros = 0;
  alignas(16) unsigned char data[kParcelBytes] = {};
};

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

Status send(const Context& context, const Parcel& parcel);
/// Segments of neighbouring tokens as items.
Status plan_segments(const Context& context, const PlanArgs& args);
/// Rows sorted by their slots, those of a slot in the order of the batch; and the items.
Status group_rows(const Context& context, const PlanArgs& args);
Status shrink(const Context& context, const ShrinkArgs& args);
Status expand(const Context& context, const ExpandArgs& args);
Status decode(const Context& context, const DecodeArgs& args);
Status outer(const Context& context, const OuterArgs& args);

}  // namespace pylora::cuda
