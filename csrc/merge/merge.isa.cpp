// The arithmetic of a merge. Per tile of 6 rows x 2 vectors the sums D are made in registers and left in a buffer in
// L1; then the rows of W are read, changed and written one after another. Writing the sums out costs 12 stores for
// some 200 multiply-adds, and keeps the kernels that differ by type and direction small.
#include "merge/kernels.h"
#include "merge/pack.h"
#include "merge/row.h"

namespace pylora::PYLORA_ISA {
namespace {

using merge::Kernels;
using merge::PanelArgs;

constexpr int kTileRows = 6;

// ---- sums ----

/// out[m, :] = left[m, :] right: M rows of one tile of columns, the ranks in order.
template <class C, int M>
void multiply_tile(const C* left, const C* right, int64_t rank, C* out) {
  Vec<C> sum[M][kTileVectors];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)  // an initialiser would clear memory first
#pragma GCC unroll 2
    for (int n = 0; n < kTileVectors; ++n)
      sum[m][n] = Vec<C>{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < rank; ++k) {
    Vec<C> column[kTileVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kTileVectors; ++n)
      column[n] = load(right + k * kTile<C> + n * kLanes<C>);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vec<C> value = splat(left[m * rank + k]);
#pragma GCC unroll 2
      for (int n = 0; n < kTileVectors; ++n)
        sum[m][n] = multiply_add(value, column[n], sum[m][n]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
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
struct TileSums {
  alignas(64) C sums[kTileRows * kTile<C>];
  const C* scale;
  const C* inverse;
  bool by_column;

  void make(const PackedChange& change, int64_t row, int rows, int64_t column) {
    const C* left = static_cast<const C*>(change.left) + row * change.rank;
    const C* right = static_cast<const C*>(change.right) + column * change.rank;
    kMultiplyTiles<C>[rows - 1](left, right, change.rank, sums);
    by_column = change.by_column;
    scale = static_cast<const C*>(change.scale) + (by_column ? column : row);
    inverse = static_cast<const C*>(change.inverse) + (by_column ? column : row);
  }

  Vec<C> sum(int m, int n) const { return load(sums + m * kTile<C> + n * kLanes<C>); }
  Vec<C> at(const C* values, int m, int n) const { return by_column ? load(values + n * kLanes<C>) : splat(values[m]); }

  // Multiplying by 1 changes nothing, so that leaving it out does not either.
  template <bool kScaled>
  Vec<C> put_in(Vec<C> value, int m, int n) const {
    if constexpr (!kScaled) return value + sum(m, n);
    return multiply_add(value, at(scale, m, n), sum(m, n));
  }
  template <bool kScaled>
  Vec<C> take_out(Vec<C> value, int m, int n) const {
    if constexpr (!kScaled) return value - sum(m, n);
    return (value - sum(m, n)) * at(inverse, m, n);
  }
};

// ---- tiles ----

/// `from` is apart from W: reading W while writing it would wait, as rows a power of two apart look like one another to
/// the CPU's check of loads against earlier stores.
template <class T>
struct TileArgs {
  const T* from;
  int64_t from_stride;
  T* to;
  int64_t to_stride;
  int8_t* codes;
  int64_t codes_stride;
  int rows;
};

enum class Step { put_in, put_in_with_codes, take_out };

/// Sums that are 0 as long as the values that made them are finite.
template <class C>
struct Probe {
  Vec<C> v[kTileVectors];

  bool is_finite() const { return horizontal_sum<C>(v[0] + v[1]) == 0; }
};

/// One tile of W. Unless kNaNs, no NaN is made one_nan's: if `probe` then is not finite, what was written is void.
template <class T, Step kStep, bool kScaled, bool kNaNs>
void change_tile(const TileArgs<T>& t, const TileSums<Accumulator<T>>& d, Probe<Accumulator<T>>* probe) {
  using C = Accumulator<T>;
  const TileArgs<T> tile = t;  // codes may point anywhere: what is read through `t` would be read again in each row
  const T* from = tile.from;
  T* to = tile.to;
  int8_t* codes = tile.codes;
  Pair<C> sum = {probe->v[0], probe->v[1]};
  for (int m = 0; m < tile.rows; ++m, from += tile.from_stride, to += tile.to_stride, codes += tile.codes_stride) {
    const Row<T> row = Row<T>::read(from);
    Pair<C> value = row.values();
    for (int n = 0; n < kTileVectors; ++n) {
      Vec<C>& v = value.v[n];
      v = kStep == Step::take_out ? d.template take_out<kScaled>(v, m, n) : d.template put_in<kScaled>(v, m, n);
      if constexpr (kNaNs) v = one_nan(v);
      if constexpr (!kNaNs) sum.v[n] = multiply_add(v, Vec<C>{}, sum.v[n]);
    }
    const Row<T> changed = kStep == Step::take_out ? Row<T>::round_back(value) : Row<T>::round(value);
    changed.write(to);
    if constexpr (kStep == Step::put_in_with_codes) {
      Pair<C> back = changed.values();
      for (int n = 0; n < kTileVectors; ++n) {
        back.v[n] = d.template take_out<kScaled>(back.v[n], m, n);
        // Not a NaN if `changed` is none, but for infinity / infinity.
        if constexpr (kNaNs || kScaled) back.v[n] = one_nan(back.v[n]);
      }
      row.write_codes(Row<T>::round_back(back), codes);
    }
  }
  for (int n = 0; n < kTileVectors; ++n)
    probe->v[n] = sum.v[n];
}

template <class T>
bool is_finite_tile(const TileArgs<T>& t, const TileSums<Accumulator<T>>& d) {
  using C = Accumulator<T>;
  Vec<C> zeros = {};  // x - x is 0 or NaN
  for (int m = 0; m < t.rows; ++m) {
    Pair<C> value = Row<T>::read(t.from + m * t.from_stride).values();
    for (int n = 0; n < kTileVectors; ++n)
      value.v[n] = one_nan(d.template put_in<true>(value.v[n], m, n));
    const Pair<C> rounded = Row<T>::round(value).values();
    for (int n = 0; n < kTileVectors; ++n)
      zeros += rounded.v[n] - rounded.v[n];
  }
  return horizontal_sum<C>(zeros) == 0;
}

// ---- panels ----

/// Rows of the next tile: six, with a balanced end (eight are 4 + 4).
int next_rows(int64_t left) {
  if (left >= 2 * kTileRows || left <= kTileRows) return static_cast<int>(min_of<int64_t>(left, kTileRows));
  return static_cast<int>((left + 1) / 2);
}

/// A tile of which only some columns, the same in each row, belong to the panel (or to W), in memory of its own.
template <class T>
struct PartialTile {
  static constexpr int64_t kWide = kTile<Accumulator<T>>;
  alignas(64) T from[kTileRows * kWide];
  alignas(64) T to[kTileRows * kWide];
  alignas(64) int8_t codes[kTileRows * kWide];

  /// The tile whose columns [begin, end) are those of `t`, the others zeros.
  TileArgs<T> read(const TileArgs<T>& t, int64_t begin, int64_t end) {
    for (int m = 0; m < t.rows; ++m) {
      __builtin_memset(from + m * kWide, 0, kWide * sizeof(T));
      __builtin_memcpy(from + m * kWide + begin, t.from + m * t.from_stride, (end - begin) * sizeof(T));
    }
    return {from, kWide, to, kWide, codes, kWide, t.rows};
  }

  void write(const TileArgs<T>& t, int64_t begin, int64_t end, bool has_codes) const {
    for (int m = 0; m < t.rows; ++m) {
      __builtin_memcpy(t.to + m * t.to_stride, to + m * kWide + begin, (end - begin) * sizeof(T));
      if (has_codes) __builtin_memcpy(t.codes + m * t.codes_stride, codes + m * kWide + begin, end - begin);
    }
  }
};

/// For all tiles of the panel fills in body.next_tile() and calls body(first row, first column), or body.partial for
/// those that reach beyond the panel; either returns false to stop.
template <class T, class Body>
bool for_tiles(const PanelArgs& p, Body& body) {
  constexpr int64_t kWide = kTile<Accumulator<T>>;
  const int64_t first_row = p.first / p.columns, last_row = (p.last - 1) / p.columns;
  const int64_t first_column = p.first - first_row * p.columns, last_column = p.last - last_row * p.columns;
  for (int64_t column = 0; column < p.columns; column += kWide) {
    const int64_t column_end = min_of(p.columns, column + kWide);
    const int64_t whole_end = last_column >= column_end ? last_row + 1 : last_row;
    for (int64_t row = first_row; row <= last_row;) {
      const int64_t begin = row == first_row && first_column > column ? first_column : column;
      const int64_t end = row == last_row ? min_of(column_end, last_column) : column_end;
      const int rows = begin == column && end == column_end ? next_rows(whole_end - row) : 1;
      const int64_t place = row * p.columns + begin - p.first;
      TileArgs<T>& t = body.next_tile();  // filled in where it stays: copies of what was just written wait for it
      t.from = static_cast<const T*>(p.from) + place;
      t.from_stride = p.columns;
      t.to = static_cast<T*>(p.w) + row * p.row_stride + begin;
      t.to_stride = p.row_stride;
      t.codes = p.codes ? p.codes + place : nullptr;
      t.codes_stride = p.codes ? p.columns : 0;
      t.rows = rows;
      if (end - begin == kWide) {
        if (!body(row, column)) return false;
      } else if (begin < end) {
        if (!body.partial(row, column, begin - column, end - column)) return false;
      }
      row += rows;
    }
  }
  return true;
}

/// Changes tiles one behind their sums: a tile's multiply-adds keep two of the CPU's units busy and the change of the
/// tile before the others.
template <class T, Step kStep, bool kScaled, bool kNaNs>
class TileChanges {
 public:
  using C = Accumulator<T>;

  explicit TileChanges(const PanelArgs& p)
      : change_(*p.change),
        has_codes_(p.codes),
        ahead_(static_cast<const char*>(p.ahead)),
        ahead_end_(ahead_ + p.ahead_bytes) {}

  TileArgs<T>& next_tile() { return tiles_[next_]; }

  bool operator()(int64_t row, int64_t column) {
    const int rows = tiles_[next_].rows;
    for (int64_t i = 0; i < rows * kTile<C> * static_cast<int64_t>(sizeof(T)) && ahead_ < ahead_end_; i += 64) {
      __builtin_prefetch(ahead_, 0, 2);
      ahead_ += 64;
    }
    sums_[next_].make(change_, row, rows, column);
    flush();
    is_waiting_ = true;
    next_ ^= 1;
    return true;
  }

  bool partial(int64_t row, int64_t column, int64_t begin, int64_t end) {
    const TileArgs<T> whole = tiles_[next_];
    tiles_[next_] = partial_.read(whole, begin, end);
    (*this)(row, column);
    flush();
    partial_.write(whole, begin, end, has_codes_);
    return true;
  }

  void flush() {
    if (is_waiting_) change_tile<T, kStep, kScaled, kNaNs>(tiles_[next_ ^ 1], sums_[next_ ^ 1], &probe_);
    is_waiting_ = false;
  }

  bool is_finite() const { return probe_.is_finite(); }

 private:
  const PackedChange& change_;
  const bool has_codes_;
  const char *ahead_, *ahead_end_;
  TileSums<C> sums_[2];
  TileArgs<T> tiles_[2];
  int next_ = 0;
  bool is_waiting_ = false;
  Probe<C> probe_{};
  PartialTile<T> partial_;
};

template <class T, Step kStep, bool kScaled, bool kNaNs>
bool try_panel(const PanelArgs& p) {
  TileChanges<T, kStep, kScaled, kNaNs> changes(p);
  for_tiles<T>(p, changes);
  changes.flush();
  return changes.is_finite();
}

template <class T, Step kStep, bool kScaled>
void change_panel(const PanelArgs& p) {
  const PlainFloatingPoint plain;
  if (!try_panel<T, kStep, kScaled, false>(p)) try_panel<T, kStep, kScaled, true>(p);
}

template <class T>
void put_in(const PanelArgs& p) {
  if (p.codes) {
    p.change->scaled ? change_panel<T, Step::put_in_with_codes, true>(p)
                     : change_panel<T, Step::put_in_with_codes, false>(p);
  } else {
    p.change->scaled ? change_panel<T, Step::put_in, true>(p) : change_panel<T, Step::put_in, false>(p);
  }
}

template <class T>
void take_out(const PanelArgs& p) {
  p.change->scaled ? change_panel<T, Step::take_out, true>(p) : change_panel<T, Step::take_out, false>(p);
}

template <class T>
struct FiniteTiles {
  const PackedChange& change;
  TileArgs<T> tile;
  TileSums<Accumulator<T>> sums;
  PartialTile<T> buffer;

  explicit FiniteTiles(const PanelArgs& p) : change(*p.change) {}

  TileArgs<T>& next_tile() { return tile; }
  bool operator()(int64_t row, int64_t column) {
    sums.make(change, row, tile.rows, column);
    return is_finite_tile<T>(tile, sums);
  }
  bool partial(int64_t row, int64_t column, int64_t begin, int64_t end) {
    tile = buffer.read(tile, begin, end);
    return (*this)(row, column);
  }
};

template <class T>
bool is_finite(const PanelArgs& p) {
  const PlainFloatingPoint plain;
  FiniteTiles<T> tiles(p);
  return for_tiles<T>(p, tiles);
}

}  // namespace

extern const Kernels merge_kernels;
const Kernels merge_kernels = {kFused,
                               {pack<float>, pack<bf16>, pack<f16>, pack<double>},
                               {put_in<float>, put_in<bf16>, put_in<f16>, put_in<double>},
                               {take_out<float>, take_out<bf16>, take_out<f16>, take_out<double>},
                               {is_finite<float>, is_finite<bf16>, is_finite<f16>, is_finite<double>}};

}  // namespace pylora::PYLORA_ISA
