// outer: d = g^T drop(x), sums over the rows of a slot. A block has 64 ranks by 128 columns (64 by FMA) of one slot, and
// goes through the items that belong to it, or a part of them.
#include "cuda/outer_tiles.cuh"

namespace pylora::cuda {
namespace {

struct Piece {
  int64_t tile_index;
  int split, slot;
  int first_rank, num_ranks;
  int64_t column;
  int num_columns;
};

PYLORA_DEVICE bool find_piece(const OuterArgs& args, int tile_columns, int64_t index, Piece* piece) {
  const int64_t stripes = (args.width + tile_columns - 1) / tile_columns;
  const int64_t rank_tiles = (args.slots.max_rank + kOuterRanks - 1) / kOuterRanks;
  piece->split = static_cast<int>(index % args.num_splits);
  piece->tile_index = index / args.num_splits;
  piece->column = piece->tile_index % stripes * tile_columns;
  piece->first_rank = static_cast<int>(piece->tile_index / stripes % rank_tiles) * kOuterRanks;
  piece->slot = static_cast<int>(piece->tile_index / stripes / rank_tiles);
  piece->num_ranks = min_of(kOuterRanks, rank_of(args.slots, piece->slot) - piece->first_rank);
  piece->num_columns = min_of(tile_columns, left_of(args.width, piece->column));
  return piece->num_ranks > 0;
}

/// Where a slot's sums go; null: nowhere.
struct OutView {
  void* data;
  int64_t first, rank_stride, column_stride;
};

PYLORA_DEVICE OutView out_of(const OuterArgs& args, int slot) {
  if (!args.places) return {args.out, slot * args.slot_stride, args.rank_stride, args.column_stride};
  const Place<void*> place = place_of<void*>(args.places, slot);
  return {place.data, 0, place.rank_stride, place.column_stride};
}

template <class C>
struct OutWriter {
  OutView out;
  DType dtype;
  const Piece& piece;
  C factor;

  PYLORA_DEVICE void operator()(int rank, int column, C sum) const {
    if (rank >= piece.num_ranks || column >= piece.num_columns || !out.data) return;
    const int64_t index =
        out.first + (piece.first_rank + rank) * out.rank_stride + (piece.column + column) * out.column_stride;
    store_element<C>(out.data, dtype, index, sum * factor);
  }
};

template <class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident) outer_kernel(const OuterArgs args) {
  using C = typename Tile::Sum;
  using T = typename Tile::Element;
  int* const box = shared_memory<int>();
  const int64_t count = num_items(args.plan);
  const int64_t tiles = outer_tiles(args.num_slots, args.slots.max_rank, args.width, args.dtype);
  const int64_t split_items = (count + args.num_splits - 1) / args.num_splits;
  for_each_piece(tiles * args.num_splits, [&](int64_t index) {
    Piece piece;
    if (!find_piece(args, Tile::kColumns, index, &piece)) return;
    const DropoutDraw draw(args.dropout, args.slots, piece.slot);
    Tile tile;
    tile.clear();
    for (int64_t i = piece.split * split_items; i < count && i < (piece.split + 1) * split_items; ++i) {
      const Item item = item_at(args.plan, i);
      if (item.slot != piece.slot) continue;
      const OuterItem<T, C> of{static_cast<const C*>(args.g.data) + piece.first_rank,
                               args.g.row_stride,
                               static_cast<const T*>(args.x.data) + piece.column,
                               args.x.row_stride,
                               piece.num_ranks,
                               piece.num_columns,
                               piece.column};
      tile.add(args.plan, item, of, draw);
    }
    const C scaling = args.scaled ? scaling_of<C>(args.slots, piece.slot) : C(1);
    const OutWriter<C> write{out_of(args, piece.slot), args.out_dtype, piece, scaling * tile.sum_scale(draw)};
    if (args.num_splits > 1) {
      add_up_splits<C>({args.counters, args.planes, piece.tile_index, piece.split, args.num_splits, kOuterRanks,
                        Tile::kColumns, piece.num_ranks, piece.num_columns},
                       tile, box, write);
      __syncthreads();  // the box has been read
    } else {
      tile.for_each(write);
    }
  });
}

template <class Tile>
Status run(const Context& context, const OuterArgs& args) {
  const int64_t tiles = outer_tiles(args.num_slots, args.slots.max_rank, args.width, args.dtype);
  return launch_blocks<outer_kernel<Tile>, kThreads, Tile::kSharedBytes>(context.stream, tiles * args.num_splits,
                                                                         Tile::kResident, Tile::kSharedBytes, args);
}

template <class T>
Status run_tensor(const Context& context, const OuterArgs& args) {
  if (args.width % 8 == 0 && rows_are_aligned(args.x.data, args.dtype, args.x.row_stride))
    return run<TensorTile<T, true>>(context, args);
  return run<TensorTile<T, false>>(context, args);
}

}  // namespace

Status outer(const Context& context, const OuterArgs& args) {
  if (args.plan.num_rows > 0x7fffffff) return unsupported("outer: expected fewer than 2^31 rows");
  if (args.slots.max_rank <= 0 || args.num_slots <= 0) return {};
  switch (args.dtype) {
    case DType::bf16:
      return run_tensor<bf16>(context, args);
    case DType::f16:
      return run_tensor<f16>(context, args);
    case DType::f64:
      return run<FmaTile<double>>(context, args);
    default:
      return run<FmaTile<float>>(context, args);
  }
}

}  // namespace pylora::cuda
