// The lora kernels, written once and compiled per instruction set. Tiles hold 12 accumulators (3 tokens x 4 ranks, 6
// tokens x 2 vectors): with AVX2's 16 registers that leaves room for the operands, and hides the latency of an FMA.
#include "cpu/simd/dropout.h"
#include "cpu/simd/stage.h"
#include "lora/kernels.h"

namespace pylora::PYLORA_ISA {
namespace {

using lora::Kernels;

// ---- staging: storage type to accumulators, with dropout, in blocks that stay in cache ----

/// A block of x as accumulators: x itself where it already is one, else a staged copy in `buffer`.
template <class T>
struct Block {
  const Accumulator<T>* data;
  int64_t stride;
};

template <class T, int64_t kColumns>
Block<T> stage_block(ConstMatrix x, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
                     const Dropout& dropout, Accumulator<T>* buffer) {
  using C = Accumulator<T>;
  if constexpr (kSame<T, C>) {
    if (!dropout.active()) return {row_of<T>(x, first_row) + first_column, x.row_stride};
  }
  alignas(64) C multiplier[kColumns];
  for (int64_t row = 0; row < rows; ++row) {
    if (dropout.active()) {
      dropout_multipliers(DropoutRow<C>(dropout), first_row + row, first_column, columns, multiplier);
    }
    stage_row(row_of<T>(x, first_row + row) + first_column, dropout.active() ? multiplier : nullptr, columns,
              buffer + row * kColumns);
  }
  return {buffer, kColumns};
}

// ---- shrink ----

constexpr int kShrinkTokens = 3, kShrinkRanks = 4;
constexpr int64_t kShrinkBlockTokens = 24;
// A chunk of 16 ranks (32 KB) stays in L1 or close to it while 24 tokens pass; the sums across lanes cost 7 %.
constexpr int64_t kShrinkChunk = 512;

template <class C, int M, int R>
void shrink_tile(const C* x, int64_t x_stride, const C* factor, int64_t factor_stride, int64_t count, C* v,
                 int64_t v_stride) {
  Vec<C> sum[M][R] = {};
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) {
    Vec<C> row[M];
    for (int m = 0; m < M; ++m)
      row[m] = load(x + m * x_stride + i);
    for (int r = 0; r < R; ++r) {
      const Vec<C> f = load(factor + r * factor_stride + i);
      for (int m = 0; m < M; ++m)
        sum[m][r] += row[m] * f;
    }
  }
  if (i < count) {
    for (int m = 0; m < M; ++m) {
      const Vec<C> row = load_partial(x + m * x_stride + i, count - i);
      for (int r = 0; r < R; ++r)
        sum[m][r] += row * load_partial(factor + r * factor_stride + i, count - i);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r)
      v[m * v_stride + r] += horizontal_sum<C>(sum[m][r]);
}

template <class C>
using ShrinkTile = void (*)(const C*, int64_t, const C*, int64_t, int64_t, C*, int64_t);
template <class C>
constexpr ShrinkTile<C> kShrinkTiles[kShrinkTokens][kShrinkRanks] = {
    {shrink_tile<C, 1, 1>, shrink_tile<C, 1, 2>, shrink_tile<C, 1, 3>, shrink_tile<C, 1, 4>},
    {shrink_tile<C, 2, 1>, shrink_tile<C, 2, 2>, shrink_tile<C, 2, 3>, shrink_tile<C, 2, 4>},
    {shrink_tile<C, 3, 1>, shrink_tile<C, 3, 2>, shrink_tile<C, 3, 3>, shrink_tile<C, 3, 4>},
};

template <class T>
void shrink(int64_t begin, int64_t end, ConstMatrix x, int64_t width, const void* factor, int64_t rank, double scaling,
            const Dropout& dropout, void* v_out) {
  using C = Accumulator<T>;
  const C* factors = static_cast<const C*>(factor);
  C* v = static_cast<C*>(v_out);
  alignas(64) C buffer[kShrinkBlockTokens * kShrinkChunk];
  for (int64_t i = begin * rank; i < end * rank; ++i)
    v[i] = 0;
  for (int64_t t = begin; t < end; t += kShrinkBlockTokens) {
    const int64_t tokens = min_of(kShrinkBlockTokens, end - t);
    for (int64_t k = 0; k < width; k += kShrinkChunk) {
      const int64_t columns = min_of(kShrinkChunk, width - k);
      const Block<T> block = stage_block<T, kShrinkChunk>(x, t, tokens, k, columns, dropout, buffer);
      for (int64_t m = 0; m < tokens; m += kShrinkTokens) {
        const int64_t m_count = min_of<int64_t>(kShrinkTokens, tokens - m);
        for (int64_t r = 0; r < rank; r += kShrinkRanks) {
          const int64_t r_count = min_of<int64_t>(kShrinkRanks, rank - r);
          kShrinkTiles<C>[m_count - 1][r_count - 1](block.data + m* block.stride, block.stride, factors + r* width + k,
                                                    width, columns, v + (t + m)* rank + r, rank);
        }
      }
    }
  }
  for (int64_t i = begin * rank; i < end * rank; ++i)
    v[i] *= static_cast<C>(scaling);
}

// ---- expand ----

constexpr int kExpandTokens = 6, kExpandVectors = 2;
constexpr int64_t kExpandBlockTokens = 48;
// Columns of y whose part of the factor stays in L2, in elements of rank x columns (128 KB of f32).
constexpr int64_t kExpandBlockElements = 32768, kExpandMaxColumns = 512;

/// One tile: y += multiplier * scaling * v factor. partial: columns of a last incomplete vector (kVectors = 1), or 0.
template <class T, int M, int kVectors, bool kPartial>
void expand_tile(const Accumulator<T>* v, int64_t rank, Accumulator<T> scaling, const Accumulator<T>* factor,
                 int64_t factor_stride, const Accumulator<T>* multiplier, int64_t multiplier_stride, T* y,
                 int64_t y_stride, int64_t partial) {
  using C = Accumulator<T>;
  Vec<C> sum[M][kVectors] = {};
  for (int64_t r = 0; r < rank; ++r) {
    Vec<C> f[kVectors];
    for (int n = 0; n < kVectors; ++n) {
      const C* p = factor + r * factor_stride + n * kLanes<C>;
      f[n] = kPartial ? load_partial(p, partial) : load(p);
    }
    for (int m = 0; m < M; ++m) {
      const Vec<C> value = splat(v[m * rank + r]);
      for (int n = 0; n < kVectors; ++n)
        sum[m][n] += value * f[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kVectors; ++n) {
      // The product with the sum comes last: GCC fuses it with the addition to y only where no branch is between them,
      // and every tile has to round alike.
      Vec<C> share = splat(scaling);
      if (multiplier) share *= load(multiplier + m * multiplier_stride + n * kLanes<C>);
      const Vec<C> delta = share * sum[m][n];
      T* p = y + m * y_stride + n * kLanes<C>;
      if (kPartial) {
        store_partial(p, load_partial(p, partial) + delta, partial);
      } else {
        store(p, load(p) + delta);
      }
    }
  }
}

template <class T>
using ExpandTile = void (*)(const Accumulator<T>*, int64_t, Accumulator<T>, const Accumulator<T>*, int64_t,
                            const Accumulator<T>*, int64_t, T*, int64_t, int64_t);
/// A tile's three widths: two vectors, one, part of one.
template <class T, int M>
constexpr ExpandTile<T> kExpandWidths[3] = {expand_tile<T, M, 2, false>, expand_tile<T, M, 1, false>,
                                            expand_tile<T, M, 1, true>};
template <class T>
constexpr const ExpandTile<T>* kExpandTiles[kExpandTokens] = {kExpandWidths<T, 1>, kExpandWidths<T, 2>,
                                                              kExpandWidths<T, 3>, kExpandWidths<T, 4>,
                                                              kExpandWidths<T, 5>, kExpandWidths<T, 6>};

constexpr int64_t expand_columns(int64_t rank) {
  const int64_t columns = kExpandBlockElements / rank / kDropoutBlock * kDropoutBlock;
  return columns < kDropoutBlock ? kDropoutBlock : min_of(columns, kExpandMaxColumns);
}

template <class T>
void expand(int64_t begin, int64_t end, const void* v_in, const void* factor, int64_t rank, double scaling,
            const Dropout& dropout, MutableMatrix y, int64_t width) {
  using C = Accumulator<T>;
  const C* v = static_cast<const C*>(v_in);
  const int64_t block_columns = expand_columns(rank);
  constexpr int64_t kWide = kExpandVectors * kLanes<C>;
  alignas(64) C multiplier[kExpandTokens * kExpandMaxColumns];
  for (int64_t t = begin; t < end; t += kExpandBlockTokens) {
    const int64_t block_end = min_of(end, t + kExpandBlockTokens);
    for (int64_t c = 0; c < width; c += block_columns) {
      const int64_t columns = min_of(block_columns, width - c);
      for (int64_t m = t; m < block_end; m += kExpandTokens) {
        const int64_t tokens = min_of<int64_t>(kExpandTokens, block_end - m);
        const ExpandTile<T>* tile = kExpandTiles<T>[tokens - 1];
        if (dropout.active()) {
          for (int64_t i = 0; i < tokens; ++i)
            dropout_multipliers(DropoutRow<C>(dropout), m + i, c, columns, multiplier + i * kExpandMaxColumns);
        }
        for (int64_t o = 0; o < columns;) {
          const int64_t left = columns - o;
          const int form = left >= kWide ? 0 : left >= kLanes<C> ? 1 : 2;
          tile[form](v + m * rank, rank, static_cast<C>(scaling), static_cast<const C*>(factor) + c + o, width,
                     dropout.active() ? multiplier + o : nullptr, kExpandMaxColumns, row_of<T>(y, m) + c + o,
                     y.row_stride, left);
          o += form == 0 ? kWide : kLanes<C>;
        }
      }
    }
  }
}

// ---- outer: the factors' gradients ----

constexpr int kOuterRanks = 4, kOuterVectors = 2;
constexpr int64_t kOuterTokens = 64, kOuterColumns = 128;  // a staged block of 32 KB of f32

template <class C, int R, int kVectors, bool kPartial>
void outer_tile(const C* v, int64_t v_stride, const C* x, int64_t x_stride, int64_t tokens, C* sums,
                int64_t sums_stride, int64_t partial) {
  Vec<C> sum[R][kVectors] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    Vec<C> row[kVectors];
    for (int n = 0; n < kVectors; ++n) {
      const C* p = x + t * x_stride + n * kLanes<C>;
      row[n] = kPartial ? load_partial(p, partial) : load(p);
    }
    for (int r = 0; r < R; ++r) {
      const Vec<C> value = splat(v[t * v_stride + r]);
      for (int n = 0; n < kVectors; ++n)
        sum[r][n] += value * row[n];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < kVectors; ++n) {
      C* p = sums + r * sums_stride + n * kLanes<C>;
      if (kPartial) {
        store_partial(p, load_partial(p, partial) + sum[r][n], partial);
      } else {
        store(p, load(p) + sum[r][n]);
      }
    }
  }
}

template <class C>
using OuterTile = void (*)(const C*, int64_t, const C*, int64_t, int64_t, C*, int64_t, int64_t);
template <class C, int R>
constexpr OuterTile<C> kOuterWidths[3] = {outer_tile<C, R, 2, false>, outer_tile<C, R, 1, false>,
                                          outer_tile<C, R, 1, true>};
template <class C>
constexpr const OuterTile<C>* kOuterTiles[kOuterRanks] = {kOuterWidths<C, 1>, kOuterWidths<C, 2>, kOuterWidths<C, 3>,
                                                          kOuterWidths<C, 4>};

template <class T>
void outer(int64_t begin, int64_t end, const void* v_in, int64_t rank, ConstMatrix x, int64_t num_tokens, int64_t width,
           double scaling, const Dropout& dropout, void* sums_out) {
  using C = Accumulator<T>;
  const C* v = static_cast<const C*>(v_in);
  C* sums = static_cast<C*>(sums_out);
  constexpr int64_t kWide = kOuterVectors * kLanes<C>;
  alignas(64) C buffer[kOuterTokens * kOuterColumns];
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t i = begin; i < end; ++i)
      sums[r * width + i] = 0;
  for (int64_t c = begin; c < end; c += kOuterColumns) {
    const int64_t columns = min_of(kOuterColumns, end - c);
    for (int64_t t = 0; t < num_tokens; t += kOuterTokens) {
      const int64_t tokens = min_of(kOuterTokens, num_tokens - t);
      const Block<T> block = stage_block<T, kOuterColumns>(x, t, tokens, c, columns, dropout, buffer);
      for (int64_t r = 0; r < rank; r += kOuterRanks) {
        const OuterTile<C>* tile = kOuterTiles<C>[min_of<int64_t>(kOuterRanks, rank - r) - 1];
        for (int64_t o = 0; o < columns;) {
          const int64_t left = columns - o;
          const int form = left >= kWide ? 0 : left >= kLanes<C> ? 1 : 2;
          tile[form](v + t * rank + r, rank, block.data + o, block.stride, tokens, sums + r * width + c + o, width,
                     left);
          o += form == 0 ? kWide : kLanes<C>;
        }
      }
    }
  }
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t i = begin; i < end; ++i)
      sums[r * width + i] *= static_cast<C>(scaling);
}

// ---- conversions and dropout alone ----

template <class F, class C>
void convert(ConstMatrix m, int64_t rows, int64_t columns, void* out) {
  stage_matrix<F>(m, 0, rows, 0, columns, static_cast<C*>(out), columns);
}

template <class F, class C>
void round_one(C value, F* out) {
  const Accumulator<F> values[kLanes<Accumulator<F>>] = {static_cast<Accumulator<F>>(value)};
  store_partial(out, load(values), 1);
}

/// The whole blocks of out[columns, rows] = transpose of m[rows, columns], rounded.
template <class F>
void round_transposed(const float* m, int64_t rows, int64_t columns, F* out) {
  constexpr int kL = kLanes<float>;
  for (int64_t j = 0; j + kL <= columns; j += kL) {
    for (int64_t i = 0; i + kL <= rows; i += kL) {
      Vec<float> block[kL];
#pragma GCC unroll 16
      for (int n = 0; n < kL; ++n)
        block[n] = load(m + (i + n) * columns + j);
      transpose(block);
#pragma GCC unroll 16
      for (int n = 0; n < kL; ++n)
        store(out + (j + n) * rows + i, block[n]);
    }
  }
}

template <class F, class C>
void round(const void* sums, int64_t rows, int64_t columns, bool transpose, void* out_data) {
  const C* m = static_cast<const C*>(sums);
  F* out = static_cast<F*>(out_data);
  int64_t whole_rows = 0, whole_columns = 0;  // done by whole vectors or blocks
  if constexpr (kSame<C, Accumulator<F>>) {
    constexpr int kL = kLanes<C>;
    whole_columns = columns / kL * kL;
    if (!transpose) {
      whole_rows = rows;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < whole_columns; j += kL)
          store(out + i * columns + j, load(m + i * columns + j));
    } else if constexpr (kSame<C, float>) {
      whole_rows = rows / kL * kL;
      round_transposed(m, rows, columns, out);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
      round_one(m[i * columns + j], out + (transpose ? j * rows + i : i * columns + j));
}

template <class T>
void drop(int64_t begin, int64_t end, ConstMatrix x, int64_t width, const Dropout& dropout, MutableMatrix out) {
  using C = Accumulator<T>;
  constexpr int64_t kChunk = 512;
  alignas(64) C staged[kChunk];
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t c = 0; c < width; c += kChunk) {
      const int64_t columns = min_of(kChunk, width - c);
      const Block<T> block = stage_block<T, kChunk>(x, t, 1, c, columns, dropout, staged);
      T* p = row_of<T>(out, t) + c;
      int64_t i = 0;
      for (; i + kLanes<C> <= columns; i += kLanes<C>)
        store(p + i, load(block.data + i));
      if (i < columns) store_partial(p + i, load_partial(block.data + i, columns - i), columns - i);
    }
  }
}

}  // namespace

extern const Kernels lora_kernels;
const Kernels lora_kernels = {
    {{convert<float, float>, convert<float, double>},
     {convert<bf16, float>, convert<bf16, double>},
     {convert<f16, float>, convert<f16, double>},
     {convert<double, float>, convert<double, double>}},
    {{round<float, float>, round<float, double>},
     {round<bf16, float>, round<bf16, double>},
     {round<f16, float>, round<f16, double>},
     {round<double, float>, round<double, double>}},
    {shrink<float>, shrink<bf16>, shrink<f16>, shrink<double>},
    {expand<float>, expand<bf16>, expand<f16>, expand<double>},
    {outer<float>, outer<bf16>, outer<f16>, outer<double>},
    {drop<float>, drop<bf16>, drop<f16>, drop<double>},
};

}  // namespace pylora::PYLORA_ISA
