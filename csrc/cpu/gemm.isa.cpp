// gemm: both operands packed to f32 panels, a tile of 6 rows x 2 vectors in registers. gemv: up to 3 rows against 4
// rows of the weight at a time, the weight read once where it lies.
#include "cpu/gemm_kernels.h"
#include "cpu/simd/transpose.h"
#include "cpu/simd/vec.h"

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

template <class T>
float scalar(const T* p) {
  return load_partial(p, 1)[0];
}
template <>
float scalar(const float* p) {
  return *p;
}

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
      out[k * rows + m] = scalar(x + m * stride + k);
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
      out[k * kTileColumns + n] = n < columns ? scalar(w + n * column_step + k * depth_step) : 0.0f;
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

/// y = round(sums + bias); bias may be null.
template <class T>
void finish_row(const float* sums, const T* bias, int64_t count, T* y) {
  int64_t o = 0;
  for (; o + kLanes<float> <= count; o += kLanes<float>) {
    const Vec<float> value = load(sums + o);
    store(y + o, bias ? value + load(bias + o) : value);
  }
  if (o < count) {
    const Vec<float> value = load_partial(sums + o, count - o);
    store_partial(y + o, bias ? value + load_partial(bias + o, count - o) : value, count - o);
  }
}

template <class T>
void gemm(int64_t begin, int64_t end, const GemmArgs& args) {
  alignas(64) float x_panel[kGemmBlockRows * kDepthBlock];
  alignas(64) float w_panel[kDepthBlock * kTileColumns];
  float* sums = static_cast<float*>(args.workspace);
  const int64_t stride = gemm_sums_stride(args.columns);
  const T* w = static_cast<const T*>(args.w.data);
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t first = 0; first < args.rows; first += kGemmBlockRows) {
    const int64_t rows = min_of(kGemmBlockRows, args.rows - first);
    const RowTiles tiles(rows);
    for (int64_t k = 0; k < args.depth || k == 0; k += kDepthBlock) {
      const int64_t depth = min_of(kDepthBlock, args.depth - k);
      for (int64_t t = 0, m = 0; t < tiles.count; m += tiles.size[t++])
        pack_rows(row_of<T>(args.x, first + m) + k, args.x.row_stride, tiles.size[t], depth, x_panel + m * depth);
      for (int64_t o = begin; o < end; o += kTileColumns) {
        pack_weight(w + o * args.w.row_stride + k * args.w.column_stride, args.w.row_stride, args.w.column_stride,
                    min_of<int64_t>(kTileColumns, end - o), depth, w_panel);
        for (int64_t t = 0, m = 0; t < tiles.count; m += tiles.size[t++])
          kMultiplyTiles[tiles.size[t] - 1](x_panel + m * depth, w_panel, depth, sums + m * stride + o, stride, k > 0);
      }
    }
    for (int64_t m = 0; m < rows; ++m)
      finish_row(sums + m * stride + begin, bias ? bias + begin : nullptr, end - begin,
                 row_of<T>(args.y, first + m) + begin);
  }
}

// ---- gemv ----

constexpr int kGemvColumns = 4;
constexpr int64_t kGemvDepth = 2048;  // x as f32 in 8 KB a row, well inside L1
constexpr int64_t kGemvBlockColumns = 256;

/// How far ahead the weight is fetched: beyond what the hardware's own stream detection covers when W is in L3.
template <class T>
constexpr int kPrefetchBytes = sizeof(T) == 4 ? 512 : 256;

template <class T>
PYLORA_INLINE void load_pair(const T* p, Vec<float>* first, Vec<float>* second) {
  *first = load(p);
  *second = load(p + kLanes<float>);
}

// bf16 two at a time in 32-bit words: the odd elements by masking, the even ones by a shift, and no shuffle. x is
// stored to match, even elements before odd ones (order_like).
PYLORA_INLINE void load_pair(const bf16* p, Vec<float>* first, Vec<float>* second) {
  typedef uint32_t Words __attribute__((vector_size(kVecBytes)));
  typedef uint32_t Unaligned __attribute__((vector_size(kVecBytes), aligned(2), may_alias));
  const Words words = *reinterpret_cast<const Unaligned*>(p);
  *first = (Vec<float>)(words << 16);
  *second = (Vec<float>)(words & 0xffff0000u);
}

/// sums[m][c] += x[m] . w[c] over `count` elements, for M rows and R columns.
template <class T, int M, int R>
void gemv_tile(const T* w, int64_t stride, const float* x, int64_t count, float sums[M][R]) {
  constexpr int kL = kLanes<float>;
  Vec<float> low[M][R] = {}, high[M][R] = {};
  int64_t k = 0;
  for (; k + 2 * kL <= count; k += 2 * kL) {
    for (int r = 0; r < R; ++r) {
      const T* p = w + r * stride + k;
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes<T>);
      Vec<float> first, second;
      load_pair(p, &first, &second);
      for (int m = 0; m < M; ++m) {
        low[m][r] += first * load(x + m * kGemvDepth + k);
        high[m][r] += second * load(x + m * kGemvDepth + k + kL);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      float sum = horizontal_sum<float>(low[m][r] + high[m][r]);
      for (int64_t i = k; i < count; ++i)
        sum += scalar(w + r * stride + i) * x[m * kGemvDepth + i];
      sums[m][r] += sum;
    }
  }
}

/// One row of x as f32, in the order that load_pair gives whole pairs of vectors in.
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
    out[k] = scalar(x + k);
}

template <class T, int M>
void gemv_rows(int64_t begin, int64_t end, const GemmArgs& args) {
  alignas(64) float x[M * kGemvDepth];
  alignas(64) float sums[M][kGemvBlockColumns];
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t block = begin; block < end; block += kGemvBlockColumns) {
    const int64_t columns = min_of(kGemvBlockColumns, end - block);
    for (int m = 0; m < M; ++m)
      for (int64_t c = 0; c < columns; ++c)
        sums[m][c] = 0.0f;
    for (int64_t k = 0; k < args.depth; k += kGemvDepth) {
      const int64_t depth = min_of(kGemvDepth, args.depth - k);
      // One block of depth is the common case, where the staged x serves every block of columns.
      if (block == begin || args.depth > kGemvDepth)
        for (int m = 0; m < M; ++m)
          stage_like_pairs(row_of<T>(args.x, m) + k, depth, x + m * kGemvDepth);
      int64_t c = 0;
      for (; c + kGemvColumns <= columns; c += kGemvColumns) {
        float tile[M][kGemvColumns] = {};
        gemv_tile<T, M, kGemvColumns>(row_of<T>(args.w, block + c) + k, args.w.row_stride, x, depth, tile);
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < kGemvColumns; ++i)
            sums[m][c + i] += tile[m][i];
      }
      for (; c < columns; ++c) {
        float tile[M][1] = {};
        gemv_tile<T, M, 1>(row_of<T>(args.w, block + c) + k, args.w.row_stride, x, depth, tile);
        for (int m = 0; m < M; ++m)
          sums[m][c] += tile[m][0];
      }
    }
    for (int m = 0; m < M; ++m)
      finish_row(sums[m], bias ? bias + block : nullptr, columns, row_of<T>(args.y, m) + block);
  }
}

template <class T>
void gemv(int64_t begin, int64_t end, const GemmArgs& args) {
  if (args.rows == 1) return gemv_rows<T, 1>(begin, end, args);
  if (args.rows == 2) return gemv_rows<T, 2>(begin, end, args);
  gemv_rows<T, 3>(begin, end, args);
}

}  // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {{gemm<float>, gemm<bf16>, gemm<f16>, nullptr},
                                  {gemv<float>, gemv<bf16>, gemv<f16>, nullptr}};

}  // namespace pylora::PYLORA_ISA
