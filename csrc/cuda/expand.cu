// expand: y += drop(scaling * v f). A block has 64 rows by 128 columns (64 by FMA) of y. Blocks that run together have
// neighbouring items and so the same columns of the factor; y passes once.
#include "cuda/expand_tiles.cuh"

namespace pylora::cuda {
namespace {

/// A block's piece of work.
struct Piece {
  Item item;
  int slice, rank;
  int64_t column, width;  // of the slice
};

constexpr int64_t tiles_of(int64_t width, int tile_columns) { return (width + tile_columns - 1) / tile_columns; }

/// The piece of column tile `tile`, counted over all slices. False: nothing to add.
PYLORA_DEVICE bool find_piece(const ExpandArgs& args, int64_t item, int64_t tile, int tile_columns, Piece* piece) {
  int slice = 0;
  while (tile >= tiles_of(args.widths[slice], tile_columns))
    tile -= tiles_of(args.widths[slice++], tile_columns);
  piece->slice = slice;
  piece->column = tile * tile_columns;
  piece->width = args.widths[slice];
  piece->item = item_at(args.plan, item);
  piece->rank = rank_of(args.slots, piece->item.slot);
  return piece->rank > 0;
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident) expand_kernel(const ExpandArgs args) {
  using C = typename Tile::Sum;
  using T = typename Tile::Element;
  const int64_t count = num_items(args.plan);
  int64_t tiles = 0;
  for (int i = 0; i < args.num_slices; ++i)
    tiles += tiles_of(args.widths[i], Tile::kColumns);
  for_each_piece(count * tiles, [&](int64_t index) {
    Piece piece;
    if (!find_piece(args, index % count, index / count, Tile::kColumns, &piece)) return;
    const FactorView factor = view_of(args.factors[piece.slice], piece.item.slot);
    const VRows<C> v{static_cast<const C*>(args.v.data) + piece.slice * args.v.slice_stride, args.v.row_stride};
    const FactorColumns f{factor.data,        args.factor_dtype,    factor.first + piece.column * factor.column_stride,
                          factor.rank_stride, factor.column_stride, left_of(piece.width, piece.column)};
    const YTile<T> y{static_cast<T*>(args.y.data) + args.columns[piece.slice] + piece.column, args.y.row_stride,
                     piece.column};
    Tile tile;
    tile.begin(args.plan, piece.item);
    tile.multiply(args.plan, piece.item, v, f, piece.rank);
    tile.add(y, f.num_columns, args.scaled ? scaling_of<C>(args.slots, piece.item.slot) : C(1),
             DropoutDraw(args.dropout, args.slots, piece.item.slot));
  });
}

template <class Tile>
Status run(const Context& context, const ExpandArgs& args) {
  int64_t tiles = 0;
  for (int i = 0; i < args.num_slices; ++i)
    tiles += tiles_of(args.widths[i], Tile::kColumns);
  return launch_blocks<expand_kernel<Tile>, kThreads, Tile::kSharedBytes>(context.stream, args.plan.max_items * tiles,
                                                                          Tile::kResident, Tile::kSharedBytes, args);
}

struct Layout {
  bool vector = true, across = true;
};

/// Whether y and the factors can be moved 16 bytes at a time, and which way the factors lie.
Layout layout_of(const ExpandArgs& args) {
  Layout layout;
  bool along = true;
  layout.vector = rows_are_aligned(args.y.data, args.dtype, args.y.row_stride);
  for (int i = 0; i < args.num_slices; ++i) {
    along &= args.factors[i].column_stride == 1;
    layout.across &= args.factors[i].rank_stride == 1;
  }
  layout.across &= !along;
  for (int i = 0; i < args.num_slices; ++i) {
    const Factor& f = args.factors[i];
    layout.vector &= args.widths[i] % 8 == 0 && args.columns[i] % 8 == 0;
    layout.vector &= along || layout.across;
    layout.vector &=
        rows_are_aligned(f.data, args.factor_dtype, f.slot_stride, layout.across ? f.column_stride : f.rank_stride);
  }
  return layout;
}

template <class T, class F>
Status run_tensor(const Context& context, const ExpandArgs& args) {
  const Layout layout = layout_of(args);
  if (layout.vector && layout.across) return run<TensorTile<T, F, true, true>>(context, args);
  if (layout.vector) return run<TensorTile<T, F, true, false>>(context, args);
  return run<TensorTile<T, F, false, false>>(context, args);
}

}  // namespace

Status expand(const Context& context, const ExpandArgs& args) {
  if (args.num_slices < 1 || args.num_slices > kMaxSlices) return invalid_argument("expand: expected 1 to 4 slices");
  if (args.plan.num_rows > 0x7fffffff) return unsupported("expand: expected fewer than 2^31 rows");
  if (args.slots.max_rank <= 0 || args.plan.max_items <= 0) return {};
  const DType f = args.factor_dtype;
  if (args.dtype == DType::bf16 && f == DType::bf16) return run_tensor<bf16, bf16>(context, args);
  if (args.dtype == DType::bf16 && f == DType::f32) return run_tensor<bf16, float>(context, args);
  if (args.dtype == DType::f16 && f == DType::f16) return run_tensor<f16, f16>(context, args);
  switch (args.dtype) {
    case DType::bf16:
      return run<FmaTile<bf16, false>>(context, args);
    case DType::f16:
      return run<FmaTile<f16, false>>(context, args);
    case DType::f64:
      return run<FmaTile<double, false>>(context, args);
    default:
      if (f == DType::f32 && layout_of(args).vector && !layout_of(args).across)
        return run<FmaTile<float, true>>(context, args);
      return run<FmaTile<float, false>>(context, args);
  }
}

}  // namespace pylora::cuda
