// gemm, of a weight that is stored transposed: both operands packed to f32 panels, a tile of 6 rows x 2 vectors in
// registers. gemv: up to 3 rows against 8 or 4 rows of the weight at a time, the weight read once where it lies.
#include "cpu/gemm_kernels.h"
#include "cpu/simd/round.h"
#include "cpu/simd/stage.h"

namespace pylora::PYLORA_ISA {
namespace {

constexpr int kTileRows = 6, kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes<float>;
constexpr int64_t kDepthBlock = 256;
constexpr int64_t kMostTiles = (kGemmBlockRows + kTileRows - 1) / kTileRows;

/// Rows split into tiles of six with a balanced end: eight are 4 + 4, since a tile of two would idle.
struct RowTiles {
  int size[kMostTiles + 1];
  int count = 0;

  explicit RowTiles(int64_t rows) {
    while (rows > 0) {
      const int64_t tile = rows >= 2 * kTileRows || rows == kTileRows ? kTileRows
                           : rows > kTileRows                         ? (rows + 1) / 2
                                                                      : rows;
      size[count++] = static_cast<int>(tile);
      rows -= tile;
    }
  }
};

/// One tile's rows of x as [depth][rows].
template <class T>
void pack_rows(const T* x, int64_t stride, int rows, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k + kLanes<float> <= depth; k += kLanes<float>) {
    for (int m = 0; m < rows; ++m) {
      float lane[kLanes<float>];
      store(lane, load(x + m * stride + k));
      for (int i = 0; i < kLanes<float>; ++i)
        out[(k + i) * rows + m] = lane[i];
    }
  }
  for (; k < depth; ++k)
    for (int m = 0; m < rows; ++m)
      out[k * rows + m] = widened(x + m * stride + k);
}

/// A tile of the weight as [depth][kTileColumns], zeros beyond `columns`. w points at its first column and depth.
template <class T>
void pack_weight(const T* w, int64_t column_step, int64_t depth_step, int64_t columns, int64_t depth, float* out) {
  constexpr int kL = kLanes<float>;
  if (columns == kTileColumns && column_step == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int n = 0; n < kTileVectors; ++n)
        store(out + k * kTileColumns + n * kL, load(w + k * depth_step + n * kL));
    return;
  }
  int64_t k = 0;
  if (columns == kTileColumns && depth_step == 1) {
    for (; k + kL <= depth; k += kL) {
      for (int n = 0; n < kTileVectors; ++n) {
        Vec<float> block[kL];
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          block[i] = load(w + (n * kL + i) * column_step + k);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          store(out + (k + i) * kTileColumns + n * kL, block[i]);
      }
    }
  }
  for (; k < depth; ++k)
    for (int n = 0; n < kTileColumns; ++n)
      out[k * kTileColumns + n] = n < columns ? widened(w + n * column_step + k * depth_step) : 0.0f;
}

/// sums[m, :] (+)= x panel times weight panel, for M rows and one tile of columns.
template <int M>
void multiply_tile(const float* x, const float* w, int64_t depth, float* sums, int64_t stride, bool accumulate) {
  constexpr int kL = kLanes<float>;
  Vec<float> sum[M][kTileVectors] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec<float> column[kTileVectors];
    for (int n = 0; n < kTileVectors; ++n)
      column[n] = load(w + k * kTileColumns + n * kL);
    for (int m = 0; m < M; ++m) {
      const Vec<float> value = splat(x[k * M + m]);
      for (int n = 0; n < kTileVectors; ++n)
        sum[m][n] += value * column[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kTileVectors; ++n) {
      float* p = sums + m * stride + n * kL;
      store(p, accumulate ? load(p) + sum[m][n] : sum[m][n]);
    }
  }
}

using MultiplyTile = void (*)(const float*, const float*, int64_t, float*, int64_t, bool);
constexpr MultiplyTile kMultiplyTiles[kTileRows] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                                    multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

/// The rows' part of the low-rank term as [depth][rows], scaled.
void pack_v(const LowRankTerm& term, int64_t first_row, int rows, int64_t k, int64_t depth, float* out) {
  pack_rows(term.v + first_row * term.rank + k, term.rank, rows, depth, out);
  for (int64_t i = 0; i < depth * rows; ++i)
    out[i] *= term.scaling;
}

/// Columns [begin, end) of sums (+)= the packed rows times a weight, of which w(o, columns, out) packs a tile.
template <class PackWeight>
void multiply_block(const RowTiles& tiles, const float* x_panel, int64_t begin, int64_t end, int64_t depth, float* sums,
                    int64_t stride, bool accumulate, const PackWeight& pack) {
  alignas(64) float w_panel[kDepthBlock * kTileColumns];
  for (int64_t o = begin; o < end; o += kTileColumns) {
    pack(o, min_of<int64_t>(kTileColumns, end - o), w_panel);
    for (int64_t t = 0, m = 0; t < tiles.count; m += tiles.size[t++])
      kMultiplyTiles[tiles.size[t] - 1](x_panel + m * depth, w_panel, depth, sums + m * stride + o, stride, accumulate);
  }
}

template <class T>
void gemm(int64_t begin, int64_t end, const GemmArgs& args) {
  alignas(64) float x_panel[kGemmBlockRows * kDepthBlock];
  float* sums = static_cast<float*>(args.workspace);
  const int64_t stride = gemm_sums_stride(args.columns);
  const T* w = static_cast<const T*>(args.w.data);
  const T* bias = static_cast<const T*>(args.bias);
  const LowRankTerm& term = args.low_rank;
  for (int64_t first = 0; first < args.rows; first += kGemmBlockRows) {
    const int64_t rows = min_of(kGemmBlockRows, args.rows - first);
    const RowTiles tiles(rows);
    for (int64_t k = 0; k < args.depth || k == 0; k += kDepthBlock) {
      const int64_t depth = min_of(kDepthBlock, args.depth - k);
      for (int64_t t = 0, m = 0; t < tiles.count; m += tiles.size[t++])
        pack_rows(row_of<T>(args.x, first + m) + k, args.x.row_stride, tiles.size[t], depth, x_panel + m * depth);
      multiply_block(tiles, x_panel, begin, end, depth, sums, stride, k > 0,
                     [&](int64_t o, int64_t columns, float* out) {
                       pack_weight(w + o * args.w.row_stride + k * args.w.column_stride, args.w.row_stride,
                                   args.w.column_stride, columns, depth, out);
                     });
    }
    for (int64_t k = 0; k < term.rank; k += kDepthBlock) {
      const int64_t depth = min_of(kDepthBlock, term.rank - k);
      for (int64_t t = 0, m = 0; t < tiles.count; m += tiles.size[t++])
        pack_v(term, first + m, tiles.size[t], k, depth, x_panel + m * depth);
      multiply_block(tiles, x_panel, begin, end, depth, sums, stride, true,
                     [&](int64_t o, int64_t columns, float* out) {
                       if (term.dtype == DType::f32) {
                         pack_weight(row_of<float>(term.b, o) + k, term.b.row_stride, 1, columns, depth, out);
                       } else {
                         pack_weight(row_of<T>(term.b, o) + k, term.b.row_stride, 1, columns, depth, out);
                       }
                     });
    }
    for (int64_t m = 0; m < rows; ++m)
      round_row(sums + m * stride + begin, args.factor ? args.factor + begin : nullptr, bias ? bias + begin : nullptr,
                end - begin, row_of<T>(args.y, first + m) + begin);
  }
}

// ---- gemv ----

/// Rows of the weight that are read at the same time, a divisor of kGemmColumnTile: which columns share a tile, and with
/// it their bits, must not depend on how columns are shared out.
template <int M>
constexpr int kGemvColumns = M == 1 ? 8 : 4;
// Depth of x that is staged as f32 at a time, 32 KB a row. Whole rows of most weights: 2048 columns at a time of one of
// 4864 were read at two thirds of the speed. An x of f32 is read where it lies.
constexpr int64_t kGemvDepth = 8192;
constexpr int64_t kGemvBlockColumns = 256;

/// Whether load_pair takes the even and the odd elements apart.
template <class T>
constexpr bool kIsSplit = false;
template <>
constexpr bool kIsSplit<bf16> = true;

template <class T>
PYLORA_INLINE void load_pair(const T* p, Vec<float>* first, Vec<float>* second) {
  *first = load(p);
  *second = load(p + kLanes<float>);
}

// bf16 two at a time in 32-bit words: the odd elements by masking, the even ones by a shift, and no shuffle. x is
// stored to match, even elements before odd ones (stage_like_pairs).
PYLORA_INLINE void load_pair(const bf16* p, Vec<float>* first, Vec<float>* second) {
  typedef uint32_t Words __attribute__((vector_size(kVecBytes)));
  typedef uint32_t Unaligned __attribute__((vector_size(kVecBytes), aligned(2), may_alias));
  const Words words = *reinterpret_cast<const Unaligned*>(p);
  *first = (Vec<float>)(words << 16);
  *second = (Vec<float>)(words & 0xffff0000u);
}

/// R rows of a weight in memory, and M rows of f32 beside them in the order that load_pair gives.
template <class T>
struct GemvOperands {
  const T* w;
  int64_t w_stride;
  const float* x;
  int64_t x_stride;
  int64_t count;
};

/// The products of M rows with R columns, before the lanes are summed. Eight sums are enough to keep the multipliers
/// busy, and leave registers for the rest; fewer are split in two.
template <int M, int R>
struct GemvSums {
  static constexpr int kParts = M * R < 8 ? 2 : 1;
  Vec<float> sum[M][R][kParts] = {};
  float tail[M][R] = {};

  template <class T>
  __attribute__((always_inline)) void add(const GemvOperands<T>& p) {
    constexpr int kPair = 2 * kLanes<float>, kLine = 64 / sizeof(T) > kPair ? 64 / sizeof(T) : kPair;
    int64_t k = 0;
    for (; k + kLine <= p.count; k += kLine) {
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kLine; i += kPair)
          add_pair(p, r, k + i);
    }
    for (; k + kPair <= p.count; k += kPair)
      for (int r = 0; r < R; ++r)
        add_pair(p, r, k);
    for (; k < p.count; ++k)
      for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r)
          tail[m][r] += widened(p.w + r * p.w_stride + k) * p.x[m * p.x_stride + k];
  }

  Vec<float> total(int m, int r) const { return kParts == 2 ? sum[m][r][0] + sum[m][r][1] : sum[m][r][0]; }

 private:
  template <class T>
  __attribute__((always_inline)) void add_pair(const GemvOperands<T>& p, int r, int64_t k) {
    Vec<float> first, second;
    load_pair(p.w + r * p.w_stride + k, &first, &second);
    for (int m = 0; m < M; ++m) {
      sum[m][r][0] += first * load(p.x + m * p.x_stride + k);
      sum[m][r][kParts - 1] += second * load(p.x + m * p.x_stride + k + kLanes<float>);
    }
  }
};

/// sums[m][c] += the products of w's operands and of b's, if any.
template <class T, class F, int M, int R>
void gemv_tile(const GemvOperands<T>& w, const GemvOperands<F>& b, float* sums) {
  GemvSums<M, R> products;
  products.add(w);
  if (b.count > 0) products.add(b);
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r)
      sums[m * kGemvBlockColumns + r] += horizontal_sum<float>(products.total(m, r)) + products.tail[m][r];
}

/// Calls the first line of each of R rows of the weight: the page is then looked up while the rows before these are
/// multiplied, and the hardware follows each row from there by itself. From memory one row of x takes .87 of the time in f32
/// (width 1024) and .81 in bf16 (2048); in f32 calling every line is slower than calling none.
template <int R, class T>
void fetch_starts(const GemvOperands<T>& p) {
  for (int r = 0; r < R; ++r)
    __builtin_prefetch(p.w + r * p.w_stride);
}

/// One row of x as f32, in the order that load_pair gives whole pairs of a T's vectors in.
template <class T>
void stage_like_pairs(const T* x, int64_t count, float* out) {
  constexpr int kL = kLanes<float>;
  int64_t k = 0;
  for (; k + 2 * kL <= count; k += 2 * kL) {
    Vec<float> first, second;
    load_pair(x + k, &first, &second);
    store(out + k, first);
    store(out + k + kL, second);
  }
  for (; k < count; ++k)
    out[k] = widened(x + k);
}

/// One row of v, scaled, in the order that load_pair gives pairs of an F's vectors in.
template <class F>
void stage_v(const float* v, int64_t rank, float scaling, float* out) {
  constexpr int kL = kLanes<float>;
  for (int64_t k = 0; k < rank; ++k) {
    const int64_t inner = k % (2 * kL);
    const bool halves = kIsSplit<F> && k - inner + 2 * kL <= rank;
    out[halves ? k - inner + inner / 2 + inner % 2 * kL : k] = v[k] * scaling;
  }
}

template <class T, class F, int M>
void gemv_rows(int64_t begin, int64_t end, const GemmArgs& args) {
  constexpr bool kDirect = kSame<T, float>;
  constexpr int kColumns = kGemvColumns<M>;
  alignas(64) float staged[kDirect ? 1 : M * kGemvDepth];
  alignas(64) float v[M * kGemvRank];
  alignas(64) float sums[M][kGemvBlockColumns];
  const T* bias = static_cast<const T*>(args.bias);
  const LowRankTerm& term = args.low_rank;
  for (int m = 0; m < M; ++m)
    stage_v<F>(term.v + m * term.rank, term.rank, term.scaling, v + m * kGemvRank);
  const int64_t depth_step = kDirect && args.depth > 0 ? args.depth : kGemvDepth;
  for (int64_t block = begin; block < end; block += kGemvBlockColumns) {
    const int64_t columns = min_of(kGemvBlockColumns, end - block);
    for (int m = 0; m < M; ++m)
      for (int64_t c = 0; c < columns; ++c)
        sums[m][c] = 0.0f;
    for (int64_t k = 0; k < args.depth || k == 0; k += depth_step) {
      const int64_t depth = min_of(depth_step, args.depth - k);
      const float* x = staged;
      int64_t x_stride = kGemvDepth;
      if constexpr (kDirect) {
        x = row_of<float>(args.x, 0);
        x_stride = args.x.row_stride;
      } else if (block == begin || args.depth > kGemvDepth) {
        // One block of depth is the common case, where the staged x serves every block of columns.
        for (int m = 0; m < M; ++m)
          stage_like_pairs(row_of<T>(args.x, m) + k, depth, staged + m * kGemvDepth);
      }
      const int64_t rank = k + depth == args.depth ? term.rank : 0;
      const auto operands = [&](int64_t c) {
        return GemvOperands<T>{row_of<T>(args.w, block + c) + k, args.w.row_stride, x, x_stride, depth};
      };
      const auto low_rank = [&](int64_t c) {
        return GemvOperands<F>{row_of<F>(term.b, block + c), term.b.row_stride, v, kGemvRank, rank};
      };
      int64_t c = 0;
      for (; c + kColumns <= columns; c += kColumns) {
        fetch_starts<kColumns>(operands(c + kColumns));
        gemv_tile<T, F, M, kColumns>(operands(c), low_rank(c), sums[0] + c);
      }
      for (; c < columns; ++c)
        gemv_tile<T, F, M, 1>(operands(c), low_rank(c), sums[0] + c);
    }
    for (int m = 0; m < M; ++m)
      round_row(sums[m], args.factor ? args.factor + block : nullptr, bias ? bias + block : nullptr, columns,
                row_of<T>(args.y, m) + block);
  }
}

template <class T, class F>
void gemv_factors(int64_t begin, int64_t end, const GemmArgs& args) {
  if (args.rows == 1) return gemv_rows<T, F, 1>(begin, end, args);
  if (args.rows == 2) return gemv_rows<T, F, 2>(begin, end, args);
  gemv_rows<T, F, 3>(begin, end, args);
}

template <class T>
void gemv(int64_t begin, int64_t end, const GemmArgs& args) {
  if (args.low_rank.dtype == DType::f32) return gemv_factors<T, float>(begin, end, args);
  gemv_factors<T, T>(begin, end, args);
}

}  // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {{gemm<float>, gemm<bf16>, gemm<f16>, nullptr},
                                  {gemv<float>, gemv<bf16>, gemv<f16>, nullptr}};

}  // namespace pylora::PYLORA_ISA
