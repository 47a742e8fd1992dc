// decode: y += scaling * (x a^T) b for groups of at most eight rows that share a slot, in one launch.
//
// Work is handed out by an atomic ticket, all parts of shrink before all parts of expand. A part of expand waits until its
// group's parts of shrink have arrived: they were handed out earlier, to blocks that wait for nothing, so that it cannot
// deadlock however few blocks are resident, and needs no cooperative launch. It asks for the factor and y before it
// waits. v is summed over the parts of the width in their order.
//
// Products have the ranks (in expand: the columns) as the sixteen rows of an mma and the tokens as its eight columns, so
// that a full group wastes nothing.
#include "cuda/decode_tiles.cuh"

namespace pylora::cuda {
namespace {

PYLORA_DEVICE Group group_at(const DecodeArgs& args, int64_t index) {
  Group group;
  group.index = index;
  if (args.row_slots) {
    group.item = {static_cast<int32_t>(index), 1, load_uniform<int32_t>(args.row_slots + index), 0};
  } else if (args.plan.items) {
    group.item = load_uniform<Item>(args.plan.items + index);
  } else {
    const int64_t first = index * kDecodeRows, left = args.plan.num_rows - first;
    group.item = {static_cast<int32_t>(first), static_cast<int32_t>(left < kDecodeRows ? left : kDecodeRows), 0, 0};
  }
  group.rank = group.item.slot < 0 ? 0 : rank_of(args.slots, group.item.slot);
  return group;
}

constexpr int64_t column_tiles(int64_t width) { return (width + kDecodeColumns - 1) / kDecodeColumns; }

/// The last block to finish leaves the counters as the first found them.
PYLORA_DEVICE void reset_counters(int32_t* counters, int64_t groups, int* box) {
  if (threadIdx.x == 0) *box = arrive(counters + 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!*box) return;
  for (int64_t i = threadIdx.x; i < 2 + groups; i += kThreads)
    store_global(counters + i, 0);
}

template <class T, bool kVector, bool kAcross>
__global__ void __launch_bounds__(kThreads, 4) decode_kernel(const DecodeArgs args) {
  using Tile = ExpandTile<T, kVector, kAcross>;
  int* const box = shared_memory<int>();
  int32_t* const counters = args.counters;
  const int64_t groups = args.plan.items ? load_uniform<int32_t>(args.plan.num_items) : args.plan.max_items;
  const int64_t splits = decode_splits(args.width);
  int64_t tiles = 0;
  for (int i = 0; i < args.num_slices; ++i)
    tiles += column_tiles(args.widths[i]);
  const int64_t shrinks = groups * splits, parts = shrinks + groups * tiles;
  while (true) {
    __syncthreads();  // the ticket and the tiles before have been read
    if (threadIdx.x == 0) *box = atomic_add(counters, 1);
    __syncthreads();
    const int64_t part = *box;
    if (part >= parts) break;
    if (part < shrinks) {
      const Group group = group_at(args, part / splits);
      if (group.rank == 0) continue;
      shrink_part<T, kVector>(args, group, part % splits, shared_memory<float>(kDecodeHeader));
      __syncthreads();  // all of the block's v is written
      if (threadIdx.x == 0) arrive(counters + 2 + group.index);
    } else {
      const Group group = group_at(args, (part - shrinks) / tiles);
      if (group.rank == 0) continue;
      int64_t tile = (part - shrinks) % tiles;
      int slice = 0;
      while (tile >= column_tiles(args.widths[slice]))
        tile -= column_tiles(args.widths[slice++]);
      Tile expand(args, group, slice, tile * kDecodeColumns);
      expand.fetch();
      if (threadIdx.x == 0)
        while (load_acquire(counters + 2 + group.index) < splits)
          spin_wait();
      __syncthreads();
      expand.multiply();
      expand.add();
    }
  }
  __syncthreads();
  reset_counters(counters, groups, box);
}

bool is_aligned(const DecodeArgs& args, bool across) {
  bool aligned = rows_are_aligned(args.x.data, args.dtype, args.x.row_stride) && args.width % 8 == 0 &&
                 rows_are_aligned(args.y.data, args.dtype, args.y.row_stride);
  for (int i = 0; i < args.num_slices; ++i) {
    const Factor &a = args.a[i], &b = args.b[i];
    aligned &= a.column_stride == 1 && rows_are_aligned(a.data, args.dtype, a.slot_stride, a.rank_stride);
    aligned &= (across ? b.rank_stride : b.column_stride) == 1;
    aligned &= rows_are_aligned(b.data, args.dtype, b.slot_stride, across ? b.column_stride : b.rank_stride);
    aligned &= args.widths[i] % 8 == 0 && args.columns[i] % 8 == 0;
  }
  return aligned;
}

template <class T, bool kVector, bool kAcross>
Status run(const Context& context, const DecodeArgs& args) {
  constexpr int kShared = kDecodeHeader + ExpandTile<T, kVector, kAcross>::kSharedBytes;
  static_assert(ExpandTile<T, kVector, kAcross>::kSharedBytes >= kShrinkShared, "shrink's sums use the same memory");
  int64_t parts = args.plan.max_items * decode_splits(args.width);
  for (int i = 0; i < args.num_slices; ++i)
    parts += args.plan.max_items * column_tiles(args.widths[i]);
  return launch_blocks<decode_kernel<T, kVector, kAcross>, kThreads, kShared>(context.stream, parts, 4, kShared, args);
}

template <class T>
Status run(const Context& context, const DecodeArgs& args) {
  if (is_aligned(args, false)) return run<T, true, false>(context, args);
  if (is_aligned(args, true)) return run<T, true, true>(context, args);
  return run<T, false, false>(context, args);
}

}  // namespace

Status decode(const Context& context, const DecodeArgs& args) {
  if (args.num_slices < 1 || args.num_slices > kMaxSlices) return invalid_argument("decode: expected 1 to 4 slices");
  if (args.plan.num_rows > 0x7fffffff) return unsupported("decode: expected fewer than 2^31 rows");
  if (args.slots.max_rank <= 0 || args.plan.max_items <= 0) return {};
  if (args.dtype == DType::bf16) return run<bf16>(context, args);
  if (args.dtype == DType::f16) return run<f16>(context, args);
  return unsupported("decode: expected bf16 or f16; other dtypes take shrink and expand");
}

}  // namespace pylora::cuda
