// The kernels of segments.h, written once and compiled per instruction set. As in the lora op, tiles hold 12
// accumulators or fewer, and operands that are no accumulators yet pass through blocks that stay in cache. A token's
// sums do not depend on the tile that it is in.
#include "cpu/segments_kernels.h"
#include "cpu/segments_token.h"
#include "cpu/simd/dropout.h"
#include "cpu/simd/stage.h"

namespace pylora::PYLORA_ISA {
namespace {

constexpr int64_t kMaxTokens = 64;  // of one block, over all kernels

// ---- factors: a block of [rank, width] as rows of accumulators ----

template <class C>
struct FactorBlock {
  const C* data;
  int64_t stride;
};

template <class F, class C>
FactorBlock<C> load_factor(ConstMatrix m, int64_t first_rank, int64_t ranks, int64_t first_column, int64_t columns,
                           C* buffer, int64_t stride) {
  if constexpr (kSame<F, C>) {
    if (m.column_stride == 1) return {row_of<F>(m, first_rank) + first_column, m.row_stride};
  }
  stage_matrix<F>(m, first_rank, ranks, first_column, columns, buffer, stride);
  return {buffer, stride};
}

/// Whether a factor's rows are accumulators as they stand in memory.
template <class C>
bool is_direct(ConstMatrix factor, DType dtype) {
  return factor.column_stride == 1 && dtype == (kSame<C, double> ? DType::f64 : DType::f32);
}

template <class C>
using LoadFactor = FactorBlock<C> (*)(ConstMatrix, int64_t, int64_t, int64_t, int64_t, C*, int64_t);
/// Indexed by the factor's DType.
template <class C>
constexpr LoadFactor<C> kLoadFactor[kNumDTypes] = {load_factor<float, C>, load_factor<bf16, C>, load_factor<f16, C>,
                                                   load_factor<double, C>};

// ---- activations: rows of one segment as accumulators ----

/// Points rows[i] at accumulators of the columns of position first + i: x itself where it is that, else `buffer`.
template <class T, int64_t kColumns>
void stage_rows(const SegmentPlan& plan, ConstMatrix x, int64_t first, int64_t count, int64_t column, int64_t columns,
                const Dropout& dropout, Accumulator<T>* buffer, const Accumulator<T>** rows) {
  using C = Accumulator<T>;
  alignas(64) C multiplier[kColumns];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = plan.token(first + i);
    const T* source = row_of<T>(x, token) + column;
    if constexpr (kSame<T, C>) {
      if (!dropout.active()) {
        rows[i] = source;
        continue;
      }
    }
    if (dropout.active()) dropout_multipliers(DropoutRow<C>(dropout), token, column, columns, multiplier);
    stage_row(source, dropout.active() ? multiplier : nullptr, columns, buffer + i * kColumns);
    rows[i] = buffer + i * kColumns;
  }
}

// ---- shrink ----

constexpr int kShrinkTokens = 3, kShrinkRanks = 4;
constexpr int64_t kShrinkBlockTokens = 32, kShrinkBlockRanks = 16;

template <class C>
using ShrinkTile = void (*)(const C* const*, const C*, int64_t, int64_t, C* const*, int64_t);
template <class C>
constexpr ShrinkTile<C> kShrinkTiles[kShrinkTokens][kShrinkRanks] = {
    {shrink_tile<C, 1, 1>, shrink_tile<C, 1, 2>, shrink_tile<C, 1, 3>, shrink_tile<C, 1, 4>},
    {shrink_tile<C, 2, 1>, shrink_tile<C, 2, 2>, shrink_tile<C, 2, 3>, shrink_tile<C, 2, 4>},
    {shrink_tile<C, 3, 1>, shrink_tile<C, 3, 2>, shrink_tile<C, 3, 3>, shrink_tile<C, 3, 4>},
};

/// One block of ranks for all tokens of the block. A single token takes eight ranks at a time: four chains of sums do
/// not hide an FMA's latency.
template <class C>
void shrink_block(const C* const* rows, C* const* v, int64_t tokens, FactorBlock<C> block, int64_t first_rank,
                  int64_t ranks, int64_t columns) {
  for (int64_t m = 0; m < tokens; m += kShrinkTokens) {
    const int64_t m_count = min_of<int64_t>(kShrinkTokens, tokens - m);
    for (int64_t r = 0; r < ranks;) {
      const C* factor = block.data + r * block.stride;
      if (m_count == 1 && ranks - r >= 8) {
        shrink_tile<C, 1, 8>(rows + m, factor, block.stride, columns, v + m, first_rank + r);
        r += 8;
        continue;
      }
      const int64_t r_count = min_of<int64_t>(kShrinkRanks, ranks - r);
      kShrinkTiles<C>[m_count - 1][r_count - 1](rows + m, factor, block.stride, columns, v + m, first_rank + r);
      r += r_count;
    }
  }
}

template <class T>
void shrink(int64_t begin, int64_t end, const SegmentPlan& plan, ConstMatrix x, int64_t width, ConstMatrix factor,
            DType factor_dtype, int64_t rank, double scaling, const Dropout& dropout, void* v_out, int64_t v_stride) {
  using C = Accumulator<T>;
  const LoadFactor<C> load_block = kLoadFactor<C>[static_cast<int>(factor_dtype)];
  alignas(64) C buffer[kShrinkBlockTokens * kShrinkChunk];
  alignas(64) C factor_buffer[kShrinkBlockRanks * kShrinkChunk];
  const C* rows[kShrinkBlockTokens];
  C* v[kShrinkBlockTokens];
  if (end - begin == 1 && width <= kShrinkBlockTokens * kShrinkChunk && is_direct<C>(factor, factor_dtype)) {
    const C* row = nullptr;
    for (int64_t k = 0; k < width; k += kShrinkChunk) {
      stage_rows<T, kShrinkChunk>(plan, x, begin, 1, k, min_of(kShrinkChunk, width - k), dropout, buffer + k, rows);
      if (k == 0) row = rows[0];
    }
    shrink_token<C>(row, row_of<C>(factor, 0), factor.row_stride, width, rank, static_cast<C>(scaling),
                    static_cast<C*>(v_out) + plan.token(begin) * v_stride);
    return;
  }
  for (int64_t p = begin; p < end; p += kShrinkBlockTokens) {
    const int64_t tokens = min_of(kShrinkBlockTokens, end - p);
    for (int64_t m = 0; m < tokens; ++m) {
      v[m] = static_cast<C*>(v_out) + plan.token(p + m) * v_stride;
      for (int64_t r = 0; r < rank; ++r)
        v[m][r] = 0;
    }
    for (int64_t k = 0; k < width; k += kShrinkChunk) {
      const int64_t columns = min_of(kShrinkChunk, width - k);
      stage_rows<T, kShrinkChunk>(plan, x, p, tokens, k, columns, dropout, buffer, rows);
      for (int64_t r = 0; r < rank; r += kShrinkBlockRanks) {
        const int64_t ranks = min_of(kShrinkBlockRanks, rank - r);
        shrink_block<C>(rows, v, tokens, load_block(factor, r, ranks, k, columns, factor_buffer, kShrinkChunk), r,
                        ranks, columns);
      }
    }
    for (int64_t m = 0; m < tokens; ++m)
      for (int64_t r = 0; r < rank; ++r)
        v[m][r] *= static_cast<C>(scaling);
  }
}

// ---- expand ----

constexpr int kExpandTokens = 6, kExpandVectors = 2;
constexpr int64_t kExpandBlockTokens = 48;
constexpr int64_t kExpandMaxRanks = 512;
// Elements and most columns of a block of the factor: 16 KB of f32, so that a transposed block and y stay in L1. Least
// columns: what a block of many ranks may exceed it by.
constexpr int64_t kExpandBlockElements = 4096, kExpandMaxColumns = 256, kExpandMinColumns = 32;

/// y += multiplier * scaling * v factor. partial: columns of a last incomplete vector (kVectors = 1), or 0.
template <class T, int M, int kVectors, bool kPartial>
void expand_tile(const Accumulator<T>* const* v, int64_t ranks, Accumulator<T> scaling, FactorBlock<Accumulator<T>> f,
                 int64_t column, const Accumulator<T>* multiplier, T* const* y, int64_t partial) {
  using C = Accumulator<T>;
  Vec<C> sum[M][kVectors] = {};
  RankOrder order(ranks);
  for (int64_t i = 0; i < ranks; ++i) {
    const int64_t r = order.next();
    Vec<C> factor[kVectors];
    for (int n = 0; n < kVectors; ++n) {
      const C* p = f.data + r * f.stride + column + n * kLanes<C>;
      factor[n] = kPartial ? load_partial(p, partial) : load(p);
    }
    for (int m = 0; m < M; ++m) {
      const Vec<C> value = splat(v[m][r]);
      for (int n = 0; n < kVectors; ++n)
        sum[m][n] += value * factor[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kVectors; ++n) {
      Vec<C> share = splat(scaling);
      if (multiplier) share *= load(multiplier + m * kExpandMaxColumns + column + n * kLanes<C>);
      T* p = y[m] + column + n * kLanes<C>;
      const Vec<C> before = kPartial ? load_partial(p, partial) : load(p);
      // Last of all: GCC fuses product and addition only where no branch is between them, and every tile has to round
      // alike, that of segments_token.h too.
      const Vec<C> after = before + share * sum[m][n];
      if (kPartial) {
        store_partial(p, after, partial);
      } else {
        store(p, after);
      }
    }
  }
}

template <class T>
using ExpandTile = void (*)(const Accumulator<T>* const*, int64_t, Accumulator<T>, FactorBlock<Accumulator<T>>, int64_t,
                            const Accumulator<T>*, T* const*, int64_t);
/// A tile's three widths: two vectors, one, part of one.
template <class T, int M>
constexpr ExpandTile<T> kExpandWidths[3] = {expand_tile<T, M, 2, false>, expand_tile<T, M, 1, false>,
                                            expand_tile<T, M, 1, true>};
template <class T>
constexpr const ExpandTile<T>* kExpandTiles[kExpandTokens] = {kExpandWidths<T, 1>, kExpandWidths<T, 2>,
                                                              kExpandWidths<T, 3>, kExpandWidths<T, 4>,
                                                              kExpandWidths<T, 5>, kExpandWidths<T, 6>};

constexpr int64_t expand_columns(int64_t ranks) {
  const int64_t columns = kExpandBlockElements / ranks / kExpandMinColumns * kExpandMinColumns;
  return columns < kExpandMinColumns ? kExpandMinColumns : min_of(columns, kExpandMaxColumns);
}

/// All columns of a block for up to kExpandTokens tokens.
template <class T>
void expand_columns_of_tokens(int64_t tokens, const Accumulator<T>* const* v, int64_t ranks, Accumulator<T> scaling,
                              FactorBlock<Accumulator<T>> block, int64_t columns, const Accumulator<T>* multiplier,
                              T* const* y) {
  using C = Accumulator<T>;
  constexpr int64_t kWide = kExpandVectors * kLanes<C>;
  const ExpandTile<T>* tile = kExpandTiles<T>[tokens - 1];
  int64_t o = 0;
  // Two chains of sums do not hide an FMA's latency: one token takes eight vectors at a time.
  constexpr int64_t kSingle = 8 * kLanes<C>;
  for (; tokens == 1 && o + kSingle <= columns; o += kSingle)
    expand_tile<T, 1, 8, false>(v, ranks, scaling, block, o, multiplier, y, 0);
  while (o < columns) {
    const int64_t left = columns - o;
    const int form = left >= kWide ? 0 : left >= kLanes<C> ? 1 : 2;
    tile[form](v, ranks, scaling, block, o, multiplier, y, left);
    o += form == 0 ? kWide : kLanes<C>;
  }
}

/// Up to kExpandMaxRanks ranks of the factor, for up to kExpandBlockTokens tokens.
template <class T>
void expand_tokens(int64_t first, int64_t tokens, const SegmentPlan& plan, const Accumulator<T>* v, int64_t v_stride,
                   ConstMatrix factor, LoadFactor<Accumulator<T>> load_block, int64_t first_rank, int64_t ranks,
                   double scaling, const Dropout& dropout, MutableMatrix y, int64_t width) {
  using C = Accumulator<T>;
  const int64_t block_columns = expand_columns(ranks);
  alignas(64) C factor_buffer[kExpandMaxRanks * kExpandMinColumns];
  alignas(64) C multiplier[kExpandTokens * kExpandMaxColumns];
  for (int64_t c = 0; c < width; c += block_columns) {
    const int64_t columns = min_of(block_columns, width - c);
    const FactorBlock<C> block = load_block(factor, first_rank, ranks, c, columns, factor_buffer, block_columns);
    for (int64_t m = 0; m < tokens; m += kExpandTokens) {
      const int64_t count = min_of<int64_t>(kExpandTokens, tokens - m);
      const C* v_rows[kExpandTokens];
      T* y_rows[kExpandTokens];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = plan.token(first + m + i);
        v_rows[i] = v + token * v_stride + first_rank;
        y_rows[i] = row_of<T>(y, token) + c;
        if (dropout.active()) {
          const int64_t aligned = c / kDropoutBlock * kDropoutBlock, ahead = c - aligned;
          alignas(64) C whole[kExpandMaxColumns + kDropoutBlock];
          dropout_multipliers(DropoutRow<C>(dropout), token, aligned, columns + ahead, whole);
          for (int64_t j = 0; j < columns; ++j)
            multiplier[i * kExpandMaxColumns + j] = whole[ahead + j];
        }
      }
      expand_columns_of_tokens<T>(count, v_rows, ranks, static_cast<C>(scaling), block, columns,
                                  dropout.active() ? multiplier : nullptr, y_rows);
    }
  }
}

template <class T>
void expand(int64_t begin, int64_t end, const SegmentPlan& plan, const void* v, int64_t v_stride, ConstMatrix factor,
            DType factor_dtype, int64_t rank, double scaling, const Dropout& dropout, MutableMatrix y, int64_t width) {
  using C = Accumulator<T>;
  const LoadFactor<C> load_block = kLoadFactor<C>[static_cast<int>(factor_dtype)];
  const bool is_alone = end - begin == 1 && !dropout.active() && is_direct<C>(factor, factor_dtype);
  for (int64_t p = begin; p < end; p += kExpandBlockTokens) {
    const int64_t tokens = min_of(kExpandBlockTokens, end - p);
    for (int64_t r = 0; r < rank; r += kExpandMaxRanks) {
      if (is_alone) {
        const int64_t token = plan.token(p);
        expand_token<T>(static_cast<const C*>(v) + token * v_stride + r, min_of(kExpandMaxRanks, rank - r),
                        static_cast<C>(scaling), row_of<C>(factor, r), factor.row_stride, row_of<T>(y, token), width);
        continue;
      }
      expand_tokens<T>(p, tokens, plan, static_cast<const C*>(v), v_stride, factor, load_block, r,
                       min_of(kExpandMaxRanks, rank - r), scaling, dropout, y, width);
    }
  }
}

// ---- outer: the factors' gradients ----

constexpr int kOuterRanks = 4, kOuterVectors = 2;
constexpr int64_t kOuterColumns = 128;  // with kMaxTokens tokens a staged block of 32 KB of f32

template <class C, int R, int kVectors, bool kPartial>
void outer_tile(const C* const* v, int64_t rank, const C* const* x, int64_t column, int64_t tokens, C scaling, C* sums,
                int64_t sums_stride, int64_t partial) {
  Vec<C> sum[R][kVectors] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    Vec<C> row[kVectors];
    for (int n = 0; n < kVectors; ++n) {
      const C* p = x[t] + column + n * kLanes<C>;
      row[n] = kPartial ? load_partial(p, partial) : load(p);
    }
    for (int r = 0; r < R; ++r) {
      const Vec<C> value = splat(v[t][rank + r]);
      for (int n = 0; n < kVectors; ++n)
        sum[r][n] += value * row[n];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < kVectors; ++n) {
      C* p = sums + r * sums_stride + n * kLanes<C>;
      const Vec<C> term = splat(scaling) * sum[r][n];
      if (kPartial) {
        store_partial(p, load_partial(p, partial) + term, partial);
      } else {
        store(p, load(p) + term);
      }
    }
  }
}

template <class C>
using OuterTile = void (*)(const C* const*, int64_t, const C* const*, int64_t, int64_t, C, C*, int64_t, int64_t);
template <class C, int R>
constexpr OuterTile<C> kOuterWidths[3] = {outer_tile<C, R, 2, false>, outer_tile<C, R, 1, false>,
                                          outer_tile<C, R, 1, true>};
template <class C>
constexpr const OuterTile<C>* kOuterTiles[kOuterRanks] = {kOuterWidths<C, 1>, kOuterWidths<C, 2>, kOuterWidths<C, 3>,
                                                          kOuterWidths<C, 4>};

template <class T>
void outer(int64_t begin, int64_t end, int64_t first, int64_t last, const SegmentPlan& plan, const void* v_in,
           int64_t v_stride, int64_t rank, ConstMatrix x, int64_t width, double scaling, const Dropout& dropout,
           void* sums_out) {
  using C = Accumulator<T>;
  C* sums = static_cast<C*>(sums_out);
  constexpr int64_t kWide = kOuterVectors * kLanes<C>;
  alignas(64) C buffer[kMaxTokens * kOuterColumns];
  const C* rows[kMaxTokens];
  const C* v[kMaxTokens];
  for (int64_t p = first; p < last; p += kMaxTokens) {
    const int64_t tokens = min_of(kMaxTokens, last - p);
    for (int64_t i = 0; i < tokens; ++i)
      v[i] = static_cast<const C*>(v_in) + plan.token(p + i) * v_stride;
    for (int64_t c = begin; c < end; c += kOuterColumns) {
      const int64_t columns = min_of(kOuterColumns, end - c);
      stage_rows<T, kOuterColumns>(plan, x, p, tokens, c, columns, dropout, buffer, rows);
      for (int64_t r = 0; r < rank; r += kOuterRanks) {
        const OuterTile<C>* tile = kOuterTiles<C>[min_of<int64_t>(kOuterRanks, rank - r) - 1];
        for (int64_t o = 0; o < columns;) {
          const int64_t left = columns - o;
          const int form = left >= kWide ? 0 : left >= kLanes<C> ? 1 : 2;
          tile[form](v, r, rows, o, tokens, static_cast<C>(scaling), sums + r * width + c + o, width, left);
          o += form == 0 ? kWide : kLanes<C>;
        }
      }
    }
  }
}

}  // namespace

extern const SegmentKernels segment_kernels;
const SegmentKernels segment_kernels = {
    {shrink<float>, shrink<bf16>, shrink<f16>, shrink<double>},
    {expand<float>, expand<bf16>, expand<f16>, expand<double>},
    {outer<float>, outer<bf16>, outer<f16>, outer<double>},
};

}  // namespace pylora::PYLORA_ISA
