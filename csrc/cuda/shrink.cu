// shrink: v = drop(x) f^T. A block has 64 rows by up to 64 ranks (of all slices side by side, so that x is read once) and
// a part of the width. Parts are summed by the block that arrives last, in the order of the parts.
#include "cuda/shrink_tiles.cuh"

namespace pylora::cuda {
namespace {

/// A block's piece of work.
struct Piece {
  Item item;
  int64_t tile_index;  // of all (item, rank tile) pairs
  int split;
  int rank;        // the slot's
  int first_rank;  // of the tile, counted over all slices
  int num_ranks;   // in the tile
};

PYLORA_DEVICE bool find_piece(const ShrinkArgs& args, int64_t count, int64_t index, Piece* piece) {
  const int64_t item = index % count, rest = index / count;
  piece->split = static_cast<int>(rest % args.num_splits);
  const int64_t tile = rest / args.num_splits;
  piece->item = item_at(args.plan, item);
  piece->tile_index = tile * args.plan.max_items + item;
  piece->rank = rank_of(args.slots, piece->item.slot);
  piece->first_rank = static_cast<int>(tile) * kTileRanks;
  piece->num_ranks = min_of(kTileRanks, piece->rank * args.num_slices - piece->first_rank);
  return piece->num_ranks > 0;
}

/// Where v of a tile's row and rank is.
template <class C>
struct VWriter {
  const ShrinkArgs& args;
  const Piece& piece;
  const int64_t* rows;
  C factor;

  PYLORA_DEVICE void operator()(int r, int n, C sum) const {
    if (r >= piece.item.rows || n >= piece.num_ranks) return;
    const int rank = piece.first_rank + n;
    C* v = static_cast<C*>(args.v.data) + rank / piece.rank * args.v.slice_stride + rows[r] * args.v.row_stride;
    store_global(v + rank % piece.rank, sum * factor);
  }
};

template <class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident) shrink_kernel(const ShrinkArgs args) {
  using C = typename Tile::Sum;
  using T = typename Tile::Element;
  int64_t* const rows = shared_memory<int64_t>();
  int* const last_box = shared_memory<int>(kItemRows * sizeof(int64_t));
  FactorView* const views = shared_memory<FactorView>(kItemRows * sizeof(int64_t) + 16);
  const int64_t count = num_items(args.plan);
  const int64_t pieces = count * args.num_splits * shrink_rank_tiles(args.slots.max_rank, args.num_slices);
  // Whole stages, so that a stage is one block of dropout's counters.
  const int64_t stages = (args.width + kStageColumns - 1) / kStageColumns;
  const int64_t split_columns = (stages + args.num_splits - 1) / args.num_splits * kStageColumns;
  for_each_piece(pieces, [&](int64_t index) {
    Piece piece;
    if (!find_piece(args, count, index, &piece)) return;
    __syncthreads();  // the tile before has been read
    for (int r = threadIdx.x; r < kItemRows; r += kThreads)
      rows[r] = r < piece.item.rows ? row_at(args.plan, piece.item, r) : 0;
    if (threadIdx.x < static_cast<unsigned>(args.num_slices))
      views[threadIdx.x] = view_of(args.factors[threadIdx.x], piece.item.slot);
    const DropoutDraw draw(args.dropout, args.slots, piece.item.slot);
    __syncthreads();
    const int64_t begin = piece.split * split_columns;
    const int64_t end = begin + split_columns < args.width ? begin + split_columns : args.width;
    Tile tile(args, kShrinkHeader);
    tile.multiply({static_cast<const T*>(args.x.data), args.x.row_stride, rows, piece.item.rows},
                  {views, piece.rank, piece.first_rank, piece.num_ranks}, begin, end, draw);
    const C scaling = args.scaled ? scaling_of<C>(args.slots, piece.item.slot) : C(1);
    const VWriter<C> write{args, piece, rows, scaling * tile.sum_scale(draw)};
    if (args.num_splits > 1) {
      add_up_splits<C>({args.counters, args.planes, piece.tile_index, piece.split, args.num_splits, kItemRows,
                        kTileRanks, piece.item.rows, piece.num_ranks},
                       tile, last_box, write);
    } else {
      tile.for_each(write);
    }
  });
}

template <class Tile>
Status run(const Context& context, const ShrinkArgs& args) {
  const int64_t tiles = args.plan.max_items * shrink_rank_tiles(args.slots.max_rank, args.num_slices);
  const int ranks = static_cast<int>(args.slots.max_rank * args.num_slices);
  return launch_blocks<shrink_kernel<Tile>, kThreads, Tile::shared_bytes(kTileRanks)>(
      context.stream, tiles * args.num_splits, Tile::kResident,
      Tile::shared_bytes(ranks < kTileRanks ? ranks : kTileRanks), args);
}

/// Whether every operand can be read 16 bytes at a time: x along its rows, factors along the width or the ranks.
bool is_aligned(const ShrinkArgs& args, bool across) {
  bool aligned = rows_are_aligned(args.x.data, args.dtype, args.x.row_stride);
  for (int i = 0; i < args.num_slices; ++i) {
    const Factor& f = args.factors[i];
    aligned &= rows_are_aligned(f.data, args.factor_dtype, f.slot_stride, across ? f.column_stride : f.rank_stride);
  }
  return aligned;
}

template <class T>
Status run_tensor(const Context& context, const ShrinkArgs& args) {
  bool along = true, across = args.num_slices == 1;
  for (int i = 0; i < args.num_slices; ++i) {
    along &= args.factors[i].column_stride == 1;
    across &= args.factors[i].rank_stride == 1;
  }
  if (along && is_aligned(args, false)) return run<TensorTile<T, true, false>>(context, args);
  if (across && is_aligned(args, true)) return run<TensorTile<T, true, true>>(context, args);
  return run<TensorTile<T, false, false>>(context, args);
}

Status run_f32(const Context& context, const ShrinkArgs& args) {
  bool vector = args.factor_dtype == DType::f32 && args.width % 4 == 0 && is_aligned(args, false);
  for (int i = 0; i < args.num_slices; ++i)
    vector &= args.factors[i].column_stride == 1;
  if (args.slots.max_rank * args.num_slices <= 16)
    return vector ? run<FmaTile<float, 16, true>>(context, args) : run<FmaTile<float, 16, false>>(context, args);
  return vector ? run<FmaTile<float, 64, true>>(context, args) : run<FmaTile<float, 64, false>>(context, args);
}

}  // namespace

Status shrink(const Context& context, const ShrinkArgs& args) {
  if (args.num_slices < 1 || args.num_slices > kMaxSlices) return invalid_argument("shrink: expected 1 to 4 slices");
  if (args.plan.num_rows > 0x7fffffff) return unsupported("shrink: expected fewer than 2^31 rows");
  if (args.slots.max_rank <= 0 || args.plan.max_items <= 0) return {};
  const bool same = args.factor_dtype == args.dtype;
  switch (args.dtype) {
    case DType::bf16:
      return same ? run_tensor<bf16>(context, args) : run<FmaTile<bf16, 64, false>>(context, args);
    case DType::f16:
      return same ? run_tensor<f16>(context, args) : run<FmaTile<f16, 64, false>>(context, args);
    case DType::f64:
      return run<FmaTile<double, 64, false>>(context, args);
    default:
      return run_f32(context, args);
  }
}

}  // namespace pylora::cuda
