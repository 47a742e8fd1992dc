// The kernels of DoRA's norms, written once and compiled per instruction set. Their tile is 6 rows of W x 2 vectors: 12
// accumulators, into which the rank's products go before they are squared, so that B A is never stored.
#include "cpu/simd/stage.h"
#include "dora/kernels.h"

namespace pylora::PYLORA_ISA {
namespace {

using dora::kPanelColumns;
using dora::NormKernels;
using dora::Product;

template <class T>
const T* element(ConstMatrix m, int64_t row, int64_t column) {
  return static_cast<const T*>(m.data) + row * m.row_stride + column * m.column_stride;
}

template <class T>
void widen(const void* data, int64_t stride, int64_t count, double* out) {
  const T* p = static_cast<const T*>(data);
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<double>(widened(p + i * stride));
}

// ---- W as rows of accumulators ----

constexpr int kTileRows = 6, kTileVectors = 2;
// A panel of A in L1 serves so many rows.
constexpr int64_t kBlockRows = 48;

/// out[rows][kPanelColumns] = a block of a matrix, zeros beyond `columns`.
template <class T, class C>
void stage(ConstMatrix w, int64_t row, int64_t rows, int64_t column, int64_t columns, C* out) {
  stage_matrix<T>(w, row, rows, column, columns, out, kPanelColumns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = columns; j < kPanelColumns; ++j)
      out[i * kPanelColumns + j] = 0;
}

template <class C>
struct Block {
  const C* data;
  int64_t stride;
};

/// A block of W as accumulators: W itself where it is that, else a staged copy in `buffer`.
template <class T>
Block<Accumulator<T>> block_of(ConstMatrix w, int64_t row, int64_t rows, int64_t column, int64_t columns,
                               Accumulator<T>* buffer) {
  if constexpr (kSame<T, Accumulator<T>>) {
    if (w.column_stride == 1 && columns == kPanelColumns) return {element<T>(w, row, column), w.row_stride};
  }
  stage<T>(w, row, rows, column, columns, buffer);
  return {buffer, kPanelColumns};
}

template <class T>
void squares(int64_t begin, int64_t end, ConstMatrix w, int64_t width, double* out) {
  using C = Accumulator<T>;
  constexpr int kL = kLanes<C>;
  alignas(64) C buffer[kBlockRows * kPanelColumns];
  for (int64_t o = begin; o < end; ++o)
    out[o] = 0;
  // A block of rows at a time only where they have to be transposed: one row is one stream for the prefetcher.
  const int64_t step = w.column_stride == 1 ? 1 : kBlockRows;
  for (int64_t o = begin; o < end; o += step) {
    const int64_t rows = min_of(step, end - o);
    for (int64_t k = 0; k < width; k += kPanelColumns) {
      const Block<C> block = block_of<T>(w, o, rows, k, min_of(kPanelColumns, width - k), buffer);
      for (int64_t i = 0; i < rows; ++i) {
        const C* p = block.data + i * block.stride;
        Vec<C> sum[4] = {};
        for (int64_t c = 0; c < kPanelColumns; c += 4 * kL)
          for (int n = 0; n < 4; ++n)
            sum[n] += load(p + c + n * kL) * load(p + c + n * kL);
        out[o + i] += static_cast<double>(horizontal_sum<C>((sum[0] + sum[1]) + (sum[2] + sum[3])));
      }
    }
  }
}

// ---- A and B converted ----

template <class F, class C>
void panels(int64_t begin, int64_t end, ConstMatrix a, int64_t rank, int64_t width, void* out) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelColumns, columns = min_of(kPanelColumns, width - first);
    stage<F>(a, 0, rank, first, columns, static_cast<C*>(out) + panel * rank * kPanelColumns);
  }
}

template <class F, class C>
void coefficients(int64_t begin, int64_t end, ConstMatrix b, int64_t rank, double scaling, void* out) {
  for (int64_t o = begin; o < end; ++o) {
    C* to = static_cast<C*>(out) + o * rank;
    int64_t r = 0;
    if constexpr (kSame<Accumulator<F>, C>) {
      if (b.column_stride == 1)
        for (; r + kLanes<C> <= rank; r += kLanes<C>)
          store(to + r, splat(static_cast<C>(scaling)) * load(element<F>(b, o, r)));
    }
    for (; r < rank; ++r)
      to[r] = static_cast<C>(scaling) * static_cast<C>(widened(element<F>(b, o, r)));
  }
}

// ---- norms ----

/// Largest rank whose coefficients a tile copies side by side: one pointer to walk along in place of six.
constexpr int64_t kPackedRank = 256;

/// Adds the squares of a tile of W + B A, and of W, over a whole panel. Coefficient r of row m lies at m * row_step + r *
/// rank_step.
template <class C, int M>
PYLORA_INLINE void norms_tile_at(const C* w, int64_t stride, const C* panel, const C* coefficient, int64_t row_step,
                                 int64_t rank_step, int64_t rank, double* sums, double* squares) {
  constexpr int kL = kLanes<C>;
  Vec<C> sum[M] = {}, own[M] = {};
  for (int64_t c = 0; c < kPanelColumns; c += kTileVectors * kL) {
    Vec<C> element[M][kTileVectors];
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < kTileVectors; ++n) {
        element[m][n] = load(w + m * stride + c + n * kL);
        own[m] += element[m][n] * element[m][n];
      }
    }
    for (int64_t r = 0; r < rank; ++r) {
      Vec<C> row[kTileVectors];
      for (int n = 0; n < kTileVectors; ++n)
        row[n] = load(panel + r * kPanelColumns + c + n * kL);
      for (int m = 0; m < M; ++m) {
        const Vec<C> value = splat(coefficient[m * row_step + r * rank_step]);
        for (int n = 0; n < kTileVectors; ++n)
          element[m][n] += value * row[n];
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < kTileVectors; ++n)
        sum[m] += element[m][n] * element[m][n];
  }
  for (int m = 0; m < M; ++m) {
    sums[m] += static_cast<double>(horizontal_sum<C>(sum[m]));
    squares[m] += static_cast<double>(horizontal_sum<C>(own[m]));
  }
}

template <class C, int M>
void norms_tile(const C* w, int64_t stride, const C* panel, const C* coefficient, int64_t rank, double* sums,
                double* squares) {
  if (rank > kPackedRank) return norms_tile_at<C, M>(w, stride, panel, coefficient, rank, 1, rank, sums, squares);
  C packed[kPackedRank * M];
  for (int64_t r = 0; r < rank; ++r)
    for (int m = 0; m < M; ++m)
      packed[r * M + m] = coefficient[m * rank + r];
  norms_tile_at<C, M>(w, stride, panel, packed, 1, M, rank, sums, squares);
}

template <class C>
using NormsTile = void (*)(const C*, int64_t, const C*, const C*, int64_t, double*, double*);
template <class C>
constexpr NormsTile<C> kNormsTiles[kTileRows] = {norms_tile<C, 1>, norms_tile<C, 2>, norms_tile<C, 3>,
                                                 norms_tile<C, 4>, norms_tile<C, 5>, norms_tile<C, 6>};

/// Asks for the rows of the next tile: their 1 KB each is too short for the hardware to see a stream.
template <class C>
PYLORA_INLINE void prefetch_rows(const C* w, int64_t stride, int64_t rows) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(C));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < kPanelColumns; c += kLine)
      __builtin_prefetch(w + i * stride + c);
}

template <class T>
void norms(int64_t begin, int64_t end, ConstMatrix w, int64_t width, const Product& product, double* sums,
           double* squares) {
  using C = Accumulator<T>;
  const C* coefficients = static_cast<const C*>(product.coefficients);
  alignas(64) C buffer[kBlockRows * kPanelColumns];
  for (int64_t o = begin; o < end; ++o)
    sums[o] = squares[o - begin] = 0;
  for (int64_t o = begin; o < end; o += kBlockRows) {
    const int64_t rows = min_of(kBlockRows, end - o);
    for (int64_t k = 0; k < width; k += kPanelColumns) {
      const Block<C> block = block_of<T>(w, o, rows, k, min_of(kPanelColumns, width - k), buffer);
      const C* panel = static_cast<const C*>(product.panels) + k * product.rank;
      for (int64_t m = 0; m < rows; m += kTileRows) {
        const int64_t count = min_of<int64_t>(kTileRows, rows - m), next = m + kTileRows;
        if (block.data != buffer && next < rows)
          prefetch_rows(block.data + next * block.stride, block.stride, min_of<int64_t>(kTileRows, rows - next));
        kNormsTiles<C>[count - 1](block.data + m* block.stride, block.stride, panel,
                                  coefficients + (o + m)* product.rank, product.rank, sums + o + m,
                                  squares + (o - begin) + m);
      }
    }
  }
}

// ---- norms from W A^T ----

template <class C>
void gram(int64_t begin, int64_t end, const void* panels, int64_t num_panels, int64_t rank, void* out) {
  constexpr int kL = kLanes<C>;
  const int64_t stride = dora::gram_stride(rank);
  for (int64_t q = begin; q < end; ++q) {
    C* row = static_cast<C*>(out) + q * stride;
    for (int64_t r = 0; r < stride; ++r) {
      double total = 0;
      for (int64_t panel = 0; r < rank && panel < num_panels; ++panel) {
        const C* first = static_cast<const C*>(panels) + (panel * rank + q) * kPanelColumns;
        const C* second = static_cast<const C*>(panels) + (panel * rank + r) * kPanelColumns;
        Vec<C> sum[4] = {};
        for (int64_t c = 0; c < kPanelColumns; c += 4 * kL)
          for (int n = 0; n < 4; ++n)
            sum[n] += load(first + c + n * kL) * load(second + c + n * kL);
        total += static_cast<double>(horizontal_sum<C>((sum[0] + sum[1]) + (sum[2] + sum[3])));
      }
      row[r] = static_cast<C>(total);
    }
  }
}

/// quads[m] = b[m, :] G b[m, :]^T for M rows b.
template <class C, int M>
void quad_tile(const C* b, int64_t rank, const C* gram, double* quads) {
  constexpr int kL = kLanes<C>;
  const int64_t stride = dora::gram_stride(rank);
  Vec<C> total[M] = {};
  for (int64_t q = 0; q < rank; q += 2 * kL) {
    Vec<C> product[M][2] = {};
    for (int64_t r = 0; r < rank; ++r) {
      const Vec<C> low = load(gram + r * stride + q), high = load(gram + r * stride + q + kL);
      for (int m = 0; m < M; ++m) {
        const Vec<C> value = splat(b[m * rank + r]);
        product[m][0] += value * low;
        product[m][1] += value * high;
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < 2; ++n) {
        const int64_t left = rank - q - n * kL;
        if (left >= kL) {
          total[m] += product[m][n] * load(b + m * rank + q + n * kL);
        } else if (left > 0) {
          total[m] += product[m][n] * load_partial(b + m * rank + q + n * kL, left);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    quads[m] = static_cast<double>(horizontal_sum<C>(total[m]));
}

template <class C>
void assemble(int64_t begin, int64_t end, ConstMatrix cross, const void* gram, const Product& product,
              const double* squares, double* sums) {
  constexpr int64_t kRows = 64;
  constexpr int kTogether = 4;
  const int64_t rank = product.rank;
  const C* coefficients = static_cast<const C*>(product.coefficients);
  for (int64_t o = begin; o < end; o += kRows) {
    const int64_t rows = min_of(kRows, end - o);
    double mixed[kRows] = {}, quads[kRows];
    for (int64_t r = 0; r < rank; ++r) {
      const C* u = row_of<C>(cross, r) + o;
      for (int64_t i = 0; i < rows; ++i)
        mixed[i] += static_cast<double>(coefficients[(o + i) * rank + r]) * static_cast<double>(u[i]);
    }
    int64_t i = 0;
    for (; i + kTogether <= rows; i += kTogether)
      quad_tile<C, kTogether>(coefficients + (o + i) * rank, rank, static_cast<const C*>(gram), quads + i);
    for (; i < rows; ++i)
      quad_tile<C, 1>(coefficients + (o + i) * rank, rank, static_cast<const C*>(gram), quads + i);
    for (i = 0; i < rows; ++i)
      sums[o + i] = squares[o + i] + 2 * mixed[i] + quads[i];
  }
}

}  // namespace

extern const NormKernels dora_norm_kernels;
const NormKernels dora_norm_kernels = {
    {widen<float>, widen<bf16>, widen<f16>, widen<double>},
    {squares<float>, squares<bf16>, squares<f16>, squares<double>},
    {{panels<float, float>, panels<float, double>},
     {panels<bf16, float>, panels<bf16, double>},
     {panels<f16, float>, panels<f16, double>},
     {panels<double, float>, panels<double, double>}},
    {{coefficients<float, float>, coefficients<float, double>},
     {coefficients<bf16, float>, coefficients<bf16, double>},
     {coefficients<f16, float>, coefficients<f16, double>},
     {coefficients<double, float>, coefficients<double, double>}},
    {norms<float>, norms<bf16>, norms<f16>, norms<double>},
    {gram<float>, gram<double>},
    {assemble<float>, assemble<double>},
};

}  // namespace pylora::PYLORA_ISA
