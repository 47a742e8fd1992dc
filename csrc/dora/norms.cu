// norms: a block has 64 rows of W and a part of the width. Parts are summed in their order by the block that arrives last,
// which also computes the rows again in f64 of which B A has left next to nothing.
#include "dora/norms_tiles.cuh"

namespace pylora::dora {
namespace {

struct NormsWork {
  NormsArgs args;
  int num_splits;
  int32_t* counters;
  double* planes;
};

/// |W[row, :] + scaling * B[row, :] A|^2 in f64, by a warp.
PYLORA_DEVICE double exact_square(const NormsArgs& args, int64_t row) {
  double sum = 0;
  for (int64_t c = lane_id(); c < args.in_features; c += kWarpSize) {
    double element = cuda::load_element<double>(args.weight.data, args.dtype,
                                                row * args.weight.row_stride + c * args.weight.column_stride);
    for (int64_t r = 0; r < args.rank; ++r) {
      const double b = cuda::load_element<double>(args.b.data, args.factor_dtype,
                                                  row * args.b.row_stride + r * args.b.column_stride);
      const double a =
          cuda::load_element<double>(args.a.data, args.factor_dtype, r * args.a.row_stride + c * args.a.column_stride);
      element += args.scaling * b * a;
    }
    sum += element * element;
  }
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2)
    sum += __shfl_xor_sync(cuda::kAllLanes, sum, step);
  return sum;
}

/// totals: shared, [rows][2]. "Not above" rather than "below": sums that overflowed are computed again too.
PYLORA_DEVICE void finish(const NormsArgs& args, const RowBlock& rows, const double* totals) {
  for (int r = warp_id(); r < rows.num_rows; r += cuda::kWarps) {
    double square = totals[2 * r];
    if (!(square > kCancelled * totals[2 * r + 1])) square = exact_square(args, rows.first + r);
    if (lane_id() == 0) cuda::store_global(args.norms + rows.first + r, ::sqrt(square));
  }
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident) norms_kernel(const NormsWork work) {
  const NormsArgs& args = work.args;
  int* const box = cuda::shared_memory<int>();
  double* const totals = cuda::shared_memory<double>(128);
  const int64_t tiles = (args.in_features + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t split_tiles = (tiles + work.num_splits - 1) / work.num_splits;
  cuda::for_each_piece(norm_row_blocks(args) * work.num_splits, [&](int64_t index) {
    const int64_t block = index / work.num_splits;
    const int split = static_cast<int>(index % work.num_splits);
    const RowBlock rows{block * kNormRows,
                        min_of(static_cast<int>(kNormRows), cuda::left_of(args.out_features, block * kNormRows))};
    Tile tile;
    for (int64_t i = split * split_tiles; i < tiles && i < (split + 1) * split_tiles; ++i)
      tile.add_columns(args, rows, i * Tile::kColumns, i == split * split_tiles);
    __syncthreads();  // the totals before have been read
    const auto keep = [&](int row, int which, double sum) { totals[2 * row + which] = sum; };
    if (work.num_splits > 1) {
      cuda::add_up_splits<double>(
          {work.counters, work.planes, block, split, work.num_splits, static_cast<int>(kNormRows), 2, rows.num_rows, 2},
          tile, box, keep);
      if (!*box) return;
    } else {
      tile.for_each(keep);
    }
    __syncthreads();
    finish(args, rows, totals);
  });
}

template <class Tile>
Status run(const Context& context, const NormsArgs& args) {
  NormsWork work{args, norm_splits(args), static_cast<int32_t*>(args.workspace), nullptr};
  work.planes = reinterpret_cast<double*>(static_cast<char*>(args.workspace) + norms_counter_bytes_cuda(args));
  return cuda::launch_blocks<norms_kernel<Tile>, kThreads, Tile::kSharedBytes>(
      context.stream, norm_row_blocks(args) * work.num_splits, Tile::kResident, Tile::kSharedBytes, work);
}

template <class T>
Status run_half(const Context& context, const NormsArgs& args) {
  const bool aligned = args.factor_dtype == args.dtype && args.weight.column_stride == 1 && args.a.column_stride == 1 &&
                       args.in_features % 8 == 0 &&
                       cuda::rows_are_aligned(args.weight.data, args.dtype, args.weight.row_stride) &&
                       cuda::rows_are_aligned(args.a.data, args.dtype, args.a.row_stride);
  return aligned ? run<TensorTile<T>>(context, args) : run<FmaTile<float>>(context, args);
}

/// A row a warp, in f32 over at most 256 columns and f64 beyond.
template <class T>
__global__ void __launch_bounds__(kThreads) squares_kernel(const SquaresArgs args) {
  constexpr int64_t kChunk = 256;
  const int64_t step = static_cast<int64_t>(gridDim.x) * cuda::kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * cuda::kWarps + warp_id(); row < args.out_features;
       row += step) {
    const T* const w = static_cast<const T*>(args.weight.data) + row * args.weight.row_stride;
    double total = 0;
    for (int64_t first = 0; first < args.in_features; first += kChunk) {
      Accumulator<T> sum = 0;
#pragma unroll
      for (int i = 0; i < kChunk; i += kWarpSize) {
        const int64_t c = first + i + lane_id();
        if (c >= args.in_features) continue;
        const Accumulator<T> value = cuda::widen(cuda::load_readonly<T>(w + c * args.weight.column_stride));
        sum += value * value;
      }
      total += sum;
    }
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2)
      total += __shfl_xor_sync(cuda::kAllLanes, total, lanes);
    if (lane_id() == 0) cuda::store_global(args.squares + row, total);
  }
}

template <class T>
Status run_squares(const Context& context, const SquaresArgs& args) {
  return cuda::launch_blocks<squares_kernel<T>, kThreads, 0>(
      context.stream, (args.out_features + cuda::kWarps - 1) / cuda::kWarps, 8, 0, args);
}

}  // namespace

Status norms_cuda(const Context& context, const NormsArgs& args) {
  if (args.rank < 1) return invalid_argument("dora: rank: expected at least 1");
  switch (args.dtype) {
    case DType::bf16:
      return run_half<bf16>(context, args);
    case DType::f16:
      return run_half<f16>(context, args);
    case DType::f64:
      return run<FmaTile<double>>(context, args);
    default:
      return run<FmaTile<float>>(context, args);
  }
}

Status squares_cuda(const Context& context, const SquaresArgs& args) {
  switch (args.dtype) {
    case DType::bf16:
      return run_squares<bf16>(context, args);
    case DType::f16:
      return run_squares<f16>(context, args);
    case DType::f64:
      return run_squares<double>(context, args);
    default:
      return run_squares<float>(context, args);
  }
}

}  // namespace pylora::dora
