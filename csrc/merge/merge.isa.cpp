// The arithmetic of a merge. Per tile of 6 rows x 2 vectors the sums D are made in registers and left in a buffer in
// L1; then the rows of W are read, changed and written one after another. Writing the sums out costs 12 stores for
// some 200 multiply-adds, and keeps the kernels that differ by type and direction small.
#include "merge/exact.h"
#include "merge/kernels.h"

namespace pylora::PYLORA_ISA {
namespace {

using merge::Adapter;
using merge::Change;
using merge::Kernels;
using merge::PackedChange;
using merge::PanelArgs;
using merge::Weight;

constexpr int kTileRows = 6, kTileVectors = 2;
template <class C>
constexpr int kTile = kTileVectors * kLanes<C>;

// ---- packing: factors of any type and stride to accumulators, scaling and row scales multiplied in ----

/// `count` <= lanes elements, `stride` apart, as accumulators C; zeros after them.
template <class C, class F>
PYLORA_INLINE void gather(const F* p, int64_t stride, int64_t count, C* out) {
  constexpr int kL = kLanes<Accumulator<F>>;
  for (int64_t i = 0; i < count; i += kL) {
    F lane[kL] = {};
    const int64_t part = min_of<int64_t>(kL, count - i);
    Accumulator<F> value[kL];
    if (stride == 1 && part == kL) {
      store(value, load(p + i));
    } else {
      for (int64_t j = 0; j < part; ++j)
        lane[j] = p[(i + j) * stride];
      store(value, load(lane));
    }
    for (int64_t j = 0; j < part; ++j)
      out[i + j] = static_cast<C>(value[j]);
  }
}

template <class C>
void gather(DType dtype, ConstMatrix m, int64_t offset, int64_t stride, int64_t count, C* out) {
  switch (dtype) {
    case DType::f32:
      return gather(static_cast<const float*>(m.data) + offset, stride, count, out);
    case DType::bf16:
      return gather(static_cast<const bf16*>(m.data) + offset, stride, count, out);
    case DType::f16:
      return gather(static_cast<const f16*>(m.data) + offset, stride, count, out);
    case DType::f64:
      return gather(static_cast<const double*>(m.data) + offset, stride, count, out);
  }
}

/// The product of the row scales from `from` on at output feature o, multiplied last to first as the merge applies
/// them.
template <class C>
C scales_from(const Change& change, int64_t from, int64_t o) {
  C product = 1;
  for (int64_t j = change.num_adapters; j-- > from;)
    if (change.adapters[j].row_scale) product *= static_cast<const C*>(change.adapters[j].row_scale)[o];
  return product;
}

constexpr int64_t kPackBlock = 64;

/// One adapter's ranks, from `first_rank` on, of left: out[row * rank + first_rank + k].
template <class C>
void pack_left(const Weight& w, const Change& change, int64_t index, int64_t adapter, int64_t first_rank,
               const PackedChange& packed) {
  const Adapter& each = change.adapters[adapter];
  C* left = static_cast<C*>(packed.left);
  const ConstMatrix m = w.transposed ? each.a : each.b;
  const int64_t row_step = w.transposed ? m.column_stride : m.row_stride;
  const int64_t rank_step = w.transposed ? m.row_stride : m.column_stride;
  const int64_t start = index * (w.transposed ? each.a_stride : each.b_stride);
  for (int64_t row = 0; row < w.rows; ++row) {
    C* out = left + row * packed.rank + first_rank;
    gather<C>(each.dtype, m, start + row * row_step, rank_step, each.rank, out);
    if (w.transposed) continue;
    const C scales = scales_from<C>(change, adapter, row);
    for (int64_t k = 0; k < each.rank; ++k)
      out[k] = out[k] * static_cast<C>(each.scaling) * scales;
  }
}

/// The same of right: out[(tile * rank + first_rank + k) * kTile + column in tile].
template <class C>
void pack_right(const Weight& w, const Change& change, int64_t index, int64_t adapter, int64_t first_rank,
                const PackedChange& packed) {
  const Adapter& each = change.adapters[adapter];
  C* right = static_cast<C*>(packed.right);
  const ConstMatrix m = w.transposed ? each.b : each.a;
  const int64_t column_step = w.transposed ? m.row_stride : m.column_stride;
  const int64_t rank_step = w.transposed ? m.column_stride : m.row_stride;
  const int64_t start = index * (w.transposed ? each.b_stride : each.a_stride);
  for (int64_t column = 0; column < w.columns; column += kTile<C>) {
    const int64_t count = min_of<int64_t>(kTile<C>, w.columns - column);
    C scales[kTile<C>];
    for (int64_t j = 0; w.transposed && j < count; ++j)
      scales[j] = scales_from<C>(change, adapter, column + j);
    for (int64_t k = 0; k < each.rank; ++k) {
      C* out = right + (column * packed.rank + (first_rank + k) * kTile<C>);
      gather<C>(each.dtype, m, start + column * column_step + k * rank_step, column_step, count, out);
      for (int64_t j = 0; w.transposed && j < count; ++j)
        out[j] = out[j] * static_cast<C>(each.scaling) * scales[j];
      for (int64_t j = count; j < kTile<C>; ++j)
        out[j] = 0;
    }
  }
}

template <class C>
void pack(const Weight& w, const Change& change, int64_t index, const PackedChange& packed) {
  const PlainFloatingPoint plain;
  int64_t first_rank = 0;
  for (int64_t j = 0; j < change.num_adapters; first_rank += change.adapters[j++].rank) {
    pack_left<C>(w, change, index, j, first_rank, packed);
    pack_right<C>(w, change, index, j, first_rank, packed);
  }
  C* scale = static_cast<C*>(packed.scale);
  C* inverse = static_cast<C*>(packed.inverse);
  const int64_t length = packed.by_column ? (w.columns + kTile<C> - 1) / kTile<C> * kTile<C> : w.rows;
  for (int64_t o = 0; o < length; ++o) {
    scale[o] = o < w.out_features() ? scales_from<C>(change, 0, o) : 1;
    inverse[o] = 1 / scale[o];
    if (!(inverse[o] - inverse[o] == 0)) inverse[o] = 0;
  }
}

// ---- tiles ----

/// out[m, :] = left[m, :] right: M rows of one tile of columns, the ranks in order.
template <class C, int M>
void multiply_tile(const C* left, const C* right, int64_t rank, C* out) {
  Vec<C> sum[M][kTileVectors];
  for (int m = 0; m < M; ++m)  // an initialiser would clear memory first
    for (int n = 0; n < kTileVectors; ++n)
      sum[m][n] = Vec<C>{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < rank; ++k) {
    Vec<C> column[kTileVectors];
    for (int n = 0; n < kTileVectors; ++n)
      column[n] = load(right + k * kTile<C> + n * kLanes<C>);
    for (int m = 0; m < M; ++m) {
      const Vec<C> value = splat(left[m * rank + k]);
      for (int n = 0; n < kTileVectors; ++n)
        sum[m][n] = multiply_add(value, column[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < kTileVectors; ++n)
      store(out + m * kTile<C> + n * kLanes<C>, sum[m][n]);
}

template <class C>
using MultiplyTile = void (*)(const C*, const C*, int64_t, C*);
template <class C>
constexpr MultiplyTile<C> kMultiplyTiles[kTileRows] = {multiply_tile<C, 1>, multiply_tile<C, 2>, multiply_tile<C, 3>,
                                                       multiply_tile<C, 4>, multiply_tile<C, 5>, multiply_tile<C, 6>};

/// A change at one tile: its sums, and the scales at its first row and column.
template <class C>
struct TileChange {
  alignas(64) C sums[kTileRows * kTile<C>];
  const C* scale;
  const C* inverse;
  bool by_column;

  void make(const PackedChange& change, int64_t row, int rows, int64_t tile) {
    const C* left = static_cast<const C*>(change.left) + row * change.rank;
    const C* right = static_cast<const C*>(change.right) + tile * change.rank * kTile<C>;
    kMultiplyTiles<C>[rows - 1](left, right, change.rank, sums);
    by_column = change.by_column;
    const int64_t first = by_column ? tile * kTile<C> : row;
    scale = static_cast<const C*>(change.scale) + first;
    inverse = static_cast<const C*>(change.inverse) + first;
  }

  Vec<C> sum(int m, int n) const { return load(sums + m * kTile<C> + n * kLanes<C>); }
  Vec<C> at(const C* values, int m, int n) const { return by_column ? load(values + n * kLanes<C>) : splat(values[m]); }

  // Multiplying by 1 changes nothing, so that leaving it out does not either.
  template <bool kScaled>
  Vec<C> put_in(Vec<C> value, int m, int n) const {
    if constexpr (!kScaled) return one_nan(value + sum(m, n));
    return one_nan(multiply_add(value, at(scale, m, n), sum(m, n)));
  }
  template <bool kScaled>
  Vec<C> take_out(Vec<C> value, int m, int n) const {
    if constexpr (!kScaled) return one_nan(value - sum(m, n));
    return one_nan((value - sum(m, n)) * at(inverse, m, n));
  }
};

/// `from` is a copy of the tile's rows, [rows, kTile], made before the sums are: reading W while writing it would wait,
/// as rows a power of two apart look like one another to the CPU's check of loads against earlier stores.
template <class T>
struct TileArgs {
  const T* from;
  T* to;
  int64_t stride;
  Word<T>* residual;
  int64_t residual_stride;
  int rows;
};

/// One tile of W: takes `out` out, then puts `in` in.
template <class T, bool kOut, bool kRead, bool kIn, bool kWrite, bool kScaled>
void change_tile(const TileArgs<T>& t, const TileChange<Accumulator<T>>& out, const TileChange<Accumulator<T>>& in) {
  constexpr int kL = kLanes<Accumulator<T>>;
  for (int m = 0; m < t.rows; ++m) {
    for (int n = 0; n < kTileVectors; ++n) {
      Word<T>* residual = nullptr;
      if constexpr (kRead || kWrite) residual = t.residual + m * t.residual_stride + n * kL;
      Words<T> words = load_words<T>(t.from + m * kTile<Accumulator<T>> + n * kL);
      if constexpr (kOut) {
        words = round_to<T>(out.template take_out<kScaled>(to_values<T>(words), m, n)).words;
        if constexpr (kRead) words = in_order<T>(in_order<T>(words) + load_words<T>(residual));
      }
      Words<T> changed = words;
      if constexpr (kIn) {
        const Rounded<T> merged = round_to<T>(in.template put_in<kScaled>(to_values<T>(words), m, n));
        changed = merged.words;
        if constexpr (kWrite) {
          const Words<T> back = round_to<T>(in.template take_out<kScaled>(merged.values, m, n)).words;
          store_words<T>(residual, in_order<T>(words) - in_order<T>(back));
        }
      }
      store_words<T>(t.to + m * t.stride + n * kL, changed);
    }
  }
}

template <class T>
bool is_finite_tile(const TileArgs<T>& t, const TileChange<Accumulator<T>>& in) {
  using C = Accumulator<T>;
  Vec<C> zeros = {};  // x - x is 0 or NaN
  for (int m = 0; m < t.rows; ++m) {
    for (int n = 0; n < kTileVectors; ++n) {
      const Vec<C> value = load(t.from + m * kTile<C> + n * kLanes<C>);
      const Vec<C> rounded = round_to<T>(in.template put_in<true>(value, m, n)).values;
      zeros += rounded - rounded;
    }
  }
  return horizontal_sum<C>(zeros) == 0;
}

template <class T>
using ChangeTile = void (*)(const TileArgs<T>&, const TileChange<Accumulator<T>>&, const TileChange<Accumulator<T>>&);

template <class T, bool kScaled>
ChangeTile<T> change_tile_for(const PanelArgs& p) {
  const bool read = p.read_residual, write = p.write_residual;
  if (!p.put_in) {
    return read ? change_tile<T, true, true, false, false, kScaled>
                : change_tile<T, true, false, false, false, kScaled>;
  }
  if (!p.take_out) {
    return write ? change_tile<T, false, false, true, true, kScaled>
                 : change_tile<T, false, false, true, false, kScaled>;
  }
  if (read) {
    return write ? change_tile<T, true, true, true, true, kScaled> : change_tile<T, true, true, true, false, kScaled>;
  }
  return write ? change_tile<T, true, false, true, true, kScaled> : change_tile<T, true, false, true, false, kScaled>;
}

// ---- panels ----

/// Rows of the next tile: six, with a balanced end (eight are 4 + 4).
int next_rows(int64_t left) {
  if (left >= 2 * kTileRows || left <= kTileRows) return static_cast<int>(min_of<int64_t>(left, kTileRows));
  return static_cast<int>((left + 1) / 2);
}

/// Calls body(tile args, first row, column tile) for the tiles of rows [row0, row1) and columns [column0, column1).
/// Tiles that reach beyond these are copied to a buffer, and back if kChanges. body returns false to stop.
template <class T, bool kChanges, class Body>
bool for_tiles(const PanelArgs& p, int64_t row0, int64_t row1, int64_t column0, int64_t column1, Body body) {
  constexpr int64_t kWide = kTile<Accumulator<T>>;
  T* w = static_cast<T*>(p.w);
  Word<T>* residuals = static_cast<Word<T>*>(p.residual);
  constexpr int64_t kAhead = 512 / sizeof(T);
  alignas(64) T values[kTileRows * kWide];
  alignas(64) Word<T> words[kTileRows * kWide];
  for (int64_t tile = column0 / kWide; tile * kWide < column1; ++tile) {
    const int64_t begin = column0 > tile * kWide ? column0 : tile * kWide;
    const int64_t end = min_of(column1, (tile + 1) * kWide);
    for (int64_t row = row0; row < row1;) {
      const int rows = next_rows(row1 - row);
      T* to = w + row * p.row_stride + begin;
      Word<T>* residual = residuals ? residuals + (row * p.columns + begin - p.first) : nullptr;
      if (end - begin == kWide) {
        for (int m = 0; m < rows; ++m) {
          __builtin_prefetch(to + m * p.row_stride + kAhead);
          __builtin_memcpy(values + m * kWide, to + m * p.row_stride, kWide * sizeof(T));
        }
        if (!body(TileArgs<T>{values, to, p.row_stride, residual, p.columns, rows}, row, tile)) return false;
      } else {
        const int64_t shift = begin - tile * kWide, bytes = (end - begin) * static_cast<int64_t>(sizeof(T));
        for (int m = 0; m < rows; ++m) {
          __builtin_memset(values + m * kWide, 0, kWide * sizeof(T));
          __builtin_memset(words + m * kWide, 0, kWide * sizeof(T));
          __builtin_memcpy(values + m * kWide + shift, to + m * p.row_stride, bytes);
          if (residual && p.read_residual) __builtin_memcpy(words + m * kWide + shift, residual + m * p.columns, bytes);
        }
        if (!body(TileArgs<T>{values, values, kWide, words, kWide, rows}, row, tile)) return false;
        for (int m = 0; kChanges && m < rows; ++m) {
          __builtin_memcpy(to + m * p.row_stride, values + m * kWide + shift, bytes);
          if (residual && p.write_residual)
            __builtin_memcpy(residual + m * p.columns, words + m * kWide + shift, bytes);
        }
      }
      row += rows;
    }
  }
  return true;
}

/// The tiles of elements [first, last): a part of a row, whole rows, a part of a row.
template <class T, bool kChanges, class Body>
bool for_elements(const PanelArgs& p, Body body) {
  for (int64_t element = p.first; element < p.last;) {
    const int64_t row = element / p.columns, column = element % p.columns, left = p.last - element;
    const int64_t rows = column == 0 && left >= p.columns ? left / p.columns : 1;
    const int64_t end = rows > 1 ? p.columns : min_of(p.columns, column + left);
    if (!for_tiles<T, kChanges>(p, row, row + rows, column, end, body)) return false;
    element += rows > 1 ? rows * p.columns : end - column;
  }
  return true;
}

template <class T>
void panel(const PanelArgs& p) {
  const PlainFloatingPoint plain;
  const bool scaled = (p.take_out && p.take_out->scaled) || (p.put_in && p.put_in->scaled);
  const ChangeTile<T> change = scaled ? change_tile_for<T, true>(p) : change_tile_for<T, false>(p);
  TileChange<Accumulator<T>> out, in;
  for_elements<T, true>(p, [&](const TileArgs<T>& t, int64_t row, int64_t tile) {
    if (p.take_out) out.make(*p.take_out, row, t.rows, tile);
    if (p.put_in) in.make(*p.put_in, row, t.rows, tile);
    change(t, out, in);
    return true;
  });
}

template <class T>
bool is_finite(const PanelArgs& p) {
  const PlainFloatingPoint plain;
  TileChange<Accumulator<T>> in;
  return for_elements<T, false>(p, [&](const TileArgs<T>& t, int64_t row, int64_t tile) {
    in.make(*p.put_in, row, t.rows, tile);
    return is_finite_tile<T>(t, in);
  });
}

}  // namespace

extern const Kernels merge_kernels;
const Kernels merge_kernels = {kFused,
                               {pack<float>, pack<double>},
                               {panel<float>, panel<bf16>, panel<f16>, panel<double>},
                               {is_finite<float>, is_finite<bf16>, is_finite<f16>, is_finite<double>}};

}  // namespace pylora::PYLORA_ISA
