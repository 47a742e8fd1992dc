// gemm with a weight as it is stored, in dot products: vectors run along the depth, so that an f32 weight is read where
// it lies and nothing of it is copied. A tile of 3 rows x 4 columns keeps 12 sums in registers and loads 7 vectors for
// 12 multiply-adds; its rows of x lie interleaved, one stream.
#include "cpu/gemm_kernels.h"
#include "cpu/simd/round.h"
#include "cpu/simd/stage.h"
#include "cpu/simd/sum_lanes.h"

namespace pylora::PYLORA_ISA {
namespace {

constexpr int kTileRows = 3, kTileColumns = 4;
// A block's four rows of the weight (8 KB) and a tile's of x (6 KB) stay in L1, all of x (256 KB) in L2. The last block
// may be longer: a low-rank term then costs no block of its own.
constexpr int64_t kBlockDepth = 512, kMostDepth = 640;
constexpr int64_t kLine = 64;

constexpr int64_t whole_vectors(int64_t count) { return (count + kLanes<float> - 1) / kLanes<float>; }
constexpr int64_t padded(int64_t count) { return whole_vectors(count) * kLanes<float>; }

/// Rows to come of a block: three at a time, and four as two twos, since a tile of one would wait for its sums.
constexpr int tile_rows(int64_t left) {
  return left == kTileRows + 1 ? 2 : static_cast<int>(min_of<int64_t>(kTileRows, left));
}

/// Part of the depth of x and w, and then part of the rank of v and b.
struct DepthBlock {
  int64_t first = 0, depth = 0;
  int64_t first_rank = 0, rank = 0;

  int64_t vectors() const { return whole_vectors(depth) + whole_vectors(rank); }
  bool is_first() const { return first == 0 && first_rank == 0; }

  /// The block after this one; false: this was the last.
  bool advance(const GemmArgs& args) {
    first += depth;
    first_rank += rank;
    const int64_t depth_left = args.depth - first, rank_left = args.low_rank.rank - first_rank;
    depth = depth_left > kMostDepth ? kBlockDepth : depth_left;
    rank = depth_left > kMostDepth ? 0 : min_of(rank_left, kMostDepth - padded(depth));
    return depth > 0 || rank > 0;
  }
};

// ---- operands ----

/// M rows as [vectors][M][lanes], zeros beyond `count`; answers where the next operand goes.
template <class T>
float* interleave(const T* x, int64_t stride, int rows, int64_t count, float scaling, float* out) {
  constexpr int kL = kLanes<float>;
  for (int64_t k = 0; k < count; k += kL) {
    for (int m = 0; m < rows; ++m, out += kL) {
      const T* p = x + m * stride + k;
      store(out, splat(scaling) * (k + kL <= count ? load(p) : load_partial(p, count - k)));
    }
  }
  return out;
}

/// The block's part of x and v, tile by tile.
template <class T>
void pack_x(const GemmArgs& args, const DepthBlock& block, int64_t first_row, int64_t rows, float* out) {
  const LowRankTerm& term = args.low_rank;
  for (int64_t m = 0; m < rows;) {
    const int count = tile_rows(rows - m);
    const int64_t row = first_row + m;
    out = interleave(row_of<T>(args.x, row) + block.first, args.x.row_stride, count, block.depth, 1.0f, out);
    out = interleave(term.v + row * term.rank + block.first_rank, term.rank, count, block.rank, term.scaling, out);
    m += count;
  }
}

/// Four rows to multiply with, each `vectors` vectors.
struct FourRows {
  const float* rows[kTileColumns];
  int64_t vectors = 0;
};

/// Four columns of y: their rows of the weight where they lie, as far as they can be read there, and what has to be
/// converted or padded, which is then all of a 16-bit weight.
template <class T>
struct Columns {
  FourRows stored, staged;
  alignas(64) float buffer[kTileColumns][kMostDepth];

  /// Columns o to o + 3; the last one stands in for those from `end` on.
  void load_block(const GemmArgs& args, const DepthBlock& block, int64_t o, int64_t end) {
    const LowRankTerm& term = args.low_rank;
    stored.vectors = kSame<T, float> ? block.depth / kLanes<float> : 0;
    staged.vectors = block.vectors() - stored.vectors;
    const int64_t done = stored.vectors * kLanes<float>;
    for (int c = 0; c < kTileColumns; ++c) {
      const int64_t column = min_of(o + c, end - 1);
      const T* w = row_of<T>(args.w, column) + block.first;
      if constexpr (kSame<T, float>) stored.rows[c] = w;
      staged.rows[c] = buffer[c];
      stage_row(w + done, nullptr, block.depth - done, buffer[c]);
      float* b = buffer[c] + padded(block.depth) - done;
      if (term.dtype == DType::f32) {
        stage_row(row_of<float>(term.b, column) + block.first_rank, nullptr, block.rank, b);
      } else {
        stage_row(row_of<T>(term.b, column) + block.first_rank, nullptr, block.rank, b);
      }
    }
  }
};

/// The rows of the weight that come next, called into L2 a share at each tile: 6 % where the weight comes from memory.
template <class T>
struct Ahead {
  const T* w = nullptr;
  int64_t stride = 0, depth = 0, share = 0;

  Ahead(const GemmArgs& args, const DepthBlock& block, int64_t column, int64_t end, int64_t tiles) {
    if (column + kTileColumns > end) return;
    constexpr int64_t kStep = kLine / sizeof(T);
    w = row_of<T>(args.w, column) + block.first;
    stride = args.w.row_stride;
    depth = block.depth;
    share = (depth / kStep + tiles) / tiles * kStep;
  }

  void fetch(int64_t tile) const {
    const int64_t last = min_of(depth, (tile + 1) * share);
    for (int c = 0; c < kTileColumns; ++c)
      for (int64_t k = tile * share; k < last; k += kLine / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(w + c * stride + k, 0, 2);
  }
};

// ---- products ----

template <int M>
PYLORA_INLINE const float* add_products(const float* x, const FourRows& w, Vec<float> (*sum)[kTileColumns]) {
  constexpr int kL = kLanes<float>;
  const float* const columns[kTileColumns] = {w.rows[0], w.rows[1], w.rows[2], w.rows[3]};
#pragma GCC unroll 2
  for (int64_t k = 0; k < w.vectors * kL; k += kL) {
    Vec<float> row[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
      row[m] = load(x + k * M + m * kL);
#pragma GCC unroll 4
    for (int c = 0; c < kTileColumns; ++c) {
      const Vec<float> column = load(columns[c] + k);  // one at a time: with 12 sums there is a register for one
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        sum[m][c] += row[m] * column;
    }
  }
  return x + w.vectors * kL * M;
}

__attribute__((noinline)) void store_some(Four total, int64_t columns, float* p, bool accumulate) {
  for (int64_t c = 0; c < columns; ++c)
    p[c] = accumulate ? p[c] + total[c] : total[c];
}

/// sums[m, :columns] (+)= the products of M rows.
template <int M>
void dot_tile(const float* x, const FourRows& stored, const FourRows& staged, int64_t columns, float* sums,
              int64_t stride, bool accumulate) {
  Vec<float> sum[M][kTileColumns];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < kTileColumns; ++c)
      sum[m][c] = Vec<float>{};
  x = add_products<M>(x, stored, sum);
  add_products<M>(x, staged, sum);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const Four total = sum_lanes(sum[m]);
    float* p = sums + m * stride;
    if (columns == kTileColumns) {
      UnalignedFour* four = reinterpret_cast<UnalignedFour*>(p);
      *four = accumulate ? *four + total : total;
    } else {
      store_some(total, columns, p, accumulate);
    }
  }
}

using DotTile = void (*)(const float*, const FourRows&, const FourRows&, int64_t, float*, int64_t, bool);
constexpr DotTile kDotTiles[kTileRows] = {dot_tile<1>, dot_tile<2>, dot_tile<3>};

/// One block of depth: sums[:rows, begin to end] (+)= the packed rows times the weight.
template <class T>
void multiply_block(const GemmArgs& args, const DepthBlock& block, const float* panel, int64_t rows, int64_t begin,
                    int64_t end, float* sums, int64_t stride) {
  Columns<T> columns;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, row_floats = block.vectors() * kLanes<float>;
  for (int64_t o = begin; o < end; o += kTileColumns) {
    columns.load_block(args, block, o, end);
    const Ahead<T> ahead(args, block, o + kTileColumns, end, tiles);
    for (int64_t m = 0, tile = 0; m < rows; ++tile) {
      const int count = tile_rows(rows - m);
      ahead.fetch(tile);
      kDotTiles[count - 1](panel + m * row_floats, columns.stored, columns.staged,
                           min_of<int64_t>(kTileColumns, end - o), sums + m * stride + o, stride, !block.is_first());
      m += count;
    }
  }
}

template <class T>
void gemm_dot(int64_t begin, int64_t end, const GemmArgs& args) {
  alignas(64) float panel[kGemmDotRows * kMostDepth];
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t block_rows = gemm_dot_block_rows(args.rows);
  for (int64_t first = 0; first < args.rows; first += block_rows) {
    const int64_t rows = min_of(block_rows, args.rows - first);
    float* sums = static_cast<float*>(args.workspace);
    int64_t stride = gemm_sums_stride(args.columns);
    if constexpr (kSame<T, float>) {
      sums = row_of<float>(args.y, first);
      stride = args.y.row_stride;
    }
    DepthBlock block;
    block.advance(args);
    do {  // once for no depth at all, which clears the sums
      pack_x<T>(args, block, first, rows, panel);
      multiply_block<T>(args, block, panel, rows, begin, end, sums, stride);
    } while (block.advance(args));
    if (kSame<T, float> && !bias && !args.factor) continue;
    for (int64_t m = 0; m < rows; ++m)
      round_row(sums + m * stride + begin, args.factor ? args.factor + begin : nullptr, bias ? bias + begin : nullptr,
                end - begin, row_of<T>(args.y, first + m) + begin);
  }
}

}  // namespace

extern const GemmDotKernels gemm_dot_kernels;
const GemmDotKernels gemm_dot_kernels = {{gemm_dot<float>, gemm_dot<bf16>, gemm_dot<f16>, nullptr}};

}  // namespace pylora::PYLORA_ISA
