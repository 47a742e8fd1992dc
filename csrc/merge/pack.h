// Packing: factors of any type and stride to accumulators, scaling and row scales multiplied in. Included by
// merge.isa.cpp alone.
#pragma once

#include "merge/kernels.h"
#include "merge/row.h"

namespace pylora::PYLORA_ISA {
namespace {

using merge::Adapter;
using merge::Change;
using merge::PackedChange;
using merge::Weight;

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

/// The same of right: out[(tile * rank + first_rank + k) * kTile + place in the tile].
template <class T, class C = Accumulator<T>>
void pack_right(const Weight& w, const Change& change, int64_t index, int64_t adapter, int64_t first_rank,
                const PackedChange& packed) {
  constexpr int64_t kWide = kTile<C>;
  const Adapter& each = change.adapters[adapter];
  C* right = static_cast<C*>(packed.right);
  const ConstMatrix m = w.transposed ? each.b : each.a;
  const int64_t column_step = w.transposed ? m.row_stride : m.column_stride;
  const int64_t rank_step = w.transposed ? m.column_stride : m.row_stride;
  const int64_t start = index * (w.transposed ? each.b_stride : each.a_stride);
  for (int64_t column = 0; column < w.columns; column += kWide) {
    const int64_t count = min_of(kWide, w.columns - column);
    C scales[kWide] = {}, values[kWide] = {};
    for (int64_t j = 0; w.transposed && j < count; ++j)
      scales[j] = scales_from<C>(change, adapter, column + j);
    for (int64_t k = 0; k < each.rank; ++k) {
      gather<C>(each.dtype, m, start + column * column_step + k * rank_step, column_step, count, values);
      for (int64_t j = 0; w.transposed && j < count; ++j)
        values[j] = values[j] * static_cast<C>(each.scaling) * scales[j];
      C* out = right + (column * packed.rank + (first_rank + k) * kWide);
      for (int j = 0; j < kWide; ++j)
        out[Row<T>::place_of(j)] = values[j];
    }
  }
}

template <class T>
void pack(const Weight& w, const Change& change, int64_t index, const PackedChange& packed) {
  using C = Accumulator<T>;
  constexpr int64_t kWide = kTile<C>;
  const PlainFloatingPoint plain;
  int64_t first_rank = 0;
  for (int64_t j = 0; j < change.num_adapters; first_rank += change.adapters[j++].rank) {
    pack_left<C>(w, change, index, j, first_rank, packed);
    pack_right<T>(w, change, index, j, first_rank, packed);
  }
  C* scale = static_cast<C*>(packed.scale);
  C* inverse = static_cast<C*>(packed.inverse);
  const int64_t length = packed.by_column ? (w.columns + kWide - 1) / kWide * kWide : w.rows;
  for (int64_t o = 0; o < length; ++o) {
    const int64_t place = packed.by_column ? o / kWide * kWide + Row<T>::place_of(static_cast<int>(o % kWide)) : o;
    scale[place] = o < w.out_features() ? scales_from<C>(change, 0, o) : 1;
    inverse[place] = 1 / scale[place];
    if (!(inverse[place] - inverse[place] == 0)) inverse[place] = 0;
  }
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
