// What the kernels over segments share: reading plans and slots, eight elements at a time, dropout as tiles hold it.
#pragma once

#include "cuda/device.cuh"
#include "cuda/grid.cuh"
#include "cuda/segments.h"

namespace pylora::cuda {

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
static_assert(kItemRows == 16 * kWarps, "a warp has 16 rows of a tile");

PYLORA_DEVICE int64_t num_items(const Plan& plan) {
  return plan.items ? load_uniform<int32_t>(plan.num_items) : plan.max_items;
}

PYLORA_DEVICE Item item_at(const Plan& plan, int64_t i) {
  if (plan.items) return load_uniform<Item>(plan.items + i);
  // Of one slot's plan: num_rows is below 2^31 (checked by the launchers).
  const int64_t first = i * kItemRows, left = plan.num_rows - first;
  return {static_cast<int32_t>(first), static_cast<int32_t>(left < kItemRows ? left : kItemRows), 0, 0};
}

PYLORA_DEVICE int64_t row_at(const Plan& plan, const Item& item, int r) {
  return plan.order ? load_readonly<int32_t>(plan.order + item.first + r) : item.first + r;
}

PYLORA_DEVICE int rank_of(const Slots& slots, int slot) {
  if (slots.entries) return load_uniform<int32_t>(&slots.entries[slot].rank);
  return slots.ranks ? load_uniform<int32_t>(slots.ranks + slot) : static_cast<int>(slots.max_rank);
}

template <class C>
PYLORA_DEVICE C scaling_of(const Slots& slots, int slot) {
  if (slots.entries) return static_cast<C>(load_uniform<double>(&slots.entries[slot].scaling));
  return slots.scalings ? static_cast<C>(load_uniform<float>(slots.scalings + slot)) : static_cast<C>(slots.scaling);
}

/// One slot of a factor: `first` is its element (0, 0).
struct FactorView {
  const void* data;
  int64_t first, rank_stride, column_stride;
};

template <class Pointer>
PYLORA_DEVICE Place<Pointer> place_of(const void* places, int slot) {
  const auto* at = reinterpret_cast<const Place<Pointer>*>(static_cast<const char*>(places) +
                                                           static_cast<int64_t>(slot) * sizeof(SlotEntry));
  return {load_uniform<Pointer>(&at->data), load_uniform<int64_t>(&at->rank_stride),
          load_uniform<int64_t>(&at->column_stride)};
}

PYLORA_DEVICE FactorView view_of(const Factor& f, int slot) {
  if (!f.places) return {f.data, slot * f.slot_stride, f.rank_stride, f.column_stride};
  const Place<const void*> place = place_of<const void*>(f.places, slot);
  return {place.data, 0, place.rank_stride, place.column_stride};
}

PYLORA_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
/// Elements from here to the end, as an int: tiles ask for a few.
PYLORA_DEVICE int left_of(int64_t end, int64_t here) {
  const int64_t left = end - here;
  return left > 1024 ? 1024 : left < 0 ? 0 : static_cast<int>(left);
}

/// A block's position in its list of work, and the next.
template <class Body>
PYLORA_DEVICE void for_each_piece(int64_t count, const Body& body) {
  for (int64_t piece = blockIdx.x; piece < count; piece += gridDim.x)
    body(piece);
}

/// Bytes that cp_async has to copy of 16, with `valid` 16-bit elements left.
PYLORA_DEVICE int copy_bytes(int valid) { return valid <= 0 ? 0 : valid >= 8 ? 16 : 2 * valid; }

/// Eight 16-bit elements, zeros from `valid` on. kVector: p is a multiple of 16 bytes, and valid at most 0 or at least 8.
template <class T, bool kVector, bool kReadOnly = true>
PYLORA_DEVICE uint4 load_eight(const T* p, int valid) {
  if constexpr (kVector) {
    if (valid <= 0) return {0, 0, 0, 0};
    return kReadOnly ? load_readonly<uint4>(p) : load_global<uint4>(p);
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= valid) continue;
      const T element = kReadOnly ? load_readonly<T>(p + i) : load_global<T>(p + i);
      words[i / 2] |= static_cast<uint32_t>(element.bits) << (i % 2 * 16);
    }
    return {words[0], words[1], words[2], words[3]};
  }
}

template <class T, bool kVector>
PYLORA_DEVICE void store_eight(T* p, const float (&values)[8], int valid) {
  if constexpr (kVector) {
    if (valid <= 0) return;
    store_global(p, uint4{pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]),
                          pack<T>(values[6], values[7])});
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < valid) store_global(p + i, narrow<T>(values[i]));
  }
}

/// Starts the copy of up to eight 16-bit elements into shared memory, or makes it. kVector: p is a multiple of 16 bytes
/// where valid > 0; `base` is an address that may be given to cp.async though nothing is read.
template <class T, bool kVector>
PYLORA_DEVICE void fetch_eight(T* shared, const T* p, int valid, const void* base) {
  if constexpr (kVector) {
    cp_async<16>(shared, valid > 0 ? p : base, copy_bytes(valid));
  } else {
    *reinterpret_cast<uint4*>(shared) = load_eight<T, false>(p, valid);
  }
}

/// The f32 in two bf16 that a bf16 cannot hold: value = high + low with 16 significant bits.
PYLORA_DEVICE float residual(float value) { return value - widen(narrow<bf16>(value)); }

/// One element of whatever dtype as an accumulator.
template <class C>
PYLORA_DEVICE C load_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::bf16:
      return static_cast<C>(widen(load_readonly<bf16>(static_cast<const bf16*>(data) + index)));
    case DType::f16:
      return static_cast<C>(widen(load_readonly<f16>(static_cast<const f16*>(data) + index)));
    case DType::f64:
      return static_cast<C>(load_readonly<double>(static_cast<const double*>(data) + index));
    default:
      return static_cast<C>(load_readonly<float>(static_cast<const float*>(data) + index));
  }
}

/// Rounds to nearest even.
template <class C>
PYLORA_DEVICE void store_element(void* data, DType dtype, int64_t index, C value) {
  switch (dtype) {
    case DType::bf16:
      return store_global(static_cast<bf16*>(data) + index, narrow<bf16>(static_cast<float>(value)));
    case DType::f16:
      return store_global(static_cast<f16*>(data) + index, narrow<f16>(static_cast<float>(value)));
    case DType::f64:
      return store_global(static_cast<double*>(data) + index, static_cast<double>(value));
    default:
      return store_global(static_cast<float*>(data) + index, static_cast<float>(value));
  }
}

/// A slot's dropout with the generator's state.
struct DropoutDraw {
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;
  double keep_scale = 1;

  PYLORA_DEVICE DropoutDraw(const Dropout& dropout, const Slots& slots, int slot) {
    if (!dropout.active()) return;
    threshold = slots.entries ? load_uniform<uint32_t>(&slots.entries[slot].threshold) : dropout.threshold;
    if (threshold == 0) return;
    seed = static_cast<uint64_t>(load_uniform<int64_t>(dropout.rng));
    offset = static_cast<uint64_t>(load_uniform<int64_t>(dropout.rng + 1));
    keep_scale = slots.entries ? load_uniform<double>(&slots.entries[slot].keep_scale) : dropout.keep_scale;
  }
  PYLORA_DEVICE bool active() const { return threshold != 0; }

  /// Bit v: whether column 64 * block + 8 * v + inner of the row is kept.
  PYLORA_DEVICE uint32_t kept(int64_t row, int64_t block, int inner) const {
    const PhiloxWords words = philox4x32({{static_cast<uint32_t>(8 * block + inner), static_cast<uint32_t>(row),
                                           static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)}},
                                         seed);
    uint32_t bits = 0;
#pragma unroll
    for (int v = 0; v < 8; ++v)
      bits |= static_cast<uint32_t>((words.word[v / 2] >> (v % 2 * 16) & 0xffff) >= threshold) << v;
    return bits;
  }
};

/// The kept bits of 64 columns of an item's rows in shared memory: byte [row][column % 8], bit column / 8.
PYLORA_DEVICE void draw_block(const DropoutDraw& draw, const int64_t* rows, int num_rows, int64_t block,
                              unsigned char* kept) {
  for (int i = threadIdx.x; i < num_rows * 8; i += kThreads)
    kept[i] = static_cast<unsigned char>(draw.kept(rows[i / 8], block, i % 8));
}
PYLORA_DEVICE bool is_kept(const unsigned char* kept, int row, int column) {
  return kept[row * 8 + column % 8] >> (column % 64 / 8) & 1;
}

/// What blocks that share a tile need to know of one another. Planes are [split][lines][columns].
struct SplitTile {
  int32_t* counters;
  void* planes;
  int64_t index;  // of the tile
  int split, num_splits;
  int lines, columns;  // of a plane
  int used_lines, used_columns;
};

/// Leaves a block's part of a tile in its plane; the block that comes last sums all planes, in their order, and hands the
/// sums to write(line, column, sum). It leaves the counter as it was found. box: an int of shared memory.
template <class C, class Tile, class Write>
PYLORA_DEVICE void add_up_splits(const SplitTile& split, const Tile& tile, int* box, const Write& write) {
  int32_t* const counter = split.counters + split.index;
  const int64_t plane = static_cast<int64_t>(split.lines) * split.columns;
  C* const planes = static_cast<C*>(split.planes) + split.index * split.num_splits * plane;
  C* const own = planes + split.split * plane;
  tile.for_each([&](int line, int column, C sum) {
    if (line < split.used_lines && column < split.used_columns) store_global(own + line * split.columns + column, sum);
  });
  __syncthreads();  // the whole part is written
  if (threadIdx.x == 0) *box = arrive(counter) == split.num_splits - 1;
  __syncthreads();
  if (!*box) return;
  for (int i = threadIdx.x; i < split.used_lines * split.used_columns; i += kThreads) {
    const int line = i / split.used_columns, column = i % split.used_columns;
    C sum = 0;
    for (int s = 0; s < split.num_splits; ++s)
      sum += load_coherent<C>(planes + s * plane + line * split.columns + column);
    write(line, column, sum);
  }
  if (threadIdx.x == 0) store_global(counter, 0);
}

/// Whether rows that begin at `data` and lie `strides` elements apart all begin at multiples of 16 bytes.
template <class... Strides>
bool rows_are_aligned(const void* data, DType dtype, Strides... strides) {
  const int64_t bytes = dtype_bytes(dtype);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((strides * bytes % 16 == 0) && ...);
}

}  // namespace pylora::cuda
