// Memory of any storage type and stride into rows of accumulators: what kernels compute with. Conversions are exact.
#pragma once

#include "common/matrix.h"
#include "cpu/simd/transpose.h"
#include "cpu/simd/vec.h"

namespace pylora::PYLORA_ISA {
namespace {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

/// *p as an accumulator.
template <class T>
PYLORA_INLINE Accumulator<T> widened(const T* p) {
  if constexpr (kSame<T, Accumulator<T>>) return *p;
  return load_partial(p, 1)[0];
}

/// out[i] = x[i] * multiplier[i] (multiplier null: 1) for i in [0, count), and zeros up to a whole vector.
template <class T>
void stage_row(const T* x, const Accumulator<T>* multiplier, int64_t count, Accumulator<T>* out) {
  using C = Accumulator<T>;
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) {
    const Vec<C> value = load(x + i);
    store(out + i, multiplier ? value * load(multiplier + i) : value);
  }
  if (i < count) {
    const Vec<C> value = load_partial(x + i, count - i);
    store(out + i, multiplier ? value * load(multiplier + i) : value);
  }
}

/// The columns that whole blocks of lanes x lanes cover, of a matrix whose neighbours in memory are rows (a transposed
/// view, as B is); answers how many these are.
template <class T>
int64_t stage_transposed(const T* data, int64_t column_stride, int64_t rows, int64_t columns, float* out,
                         int64_t out_stride) {
  constexpr int kL = kLanes<float>;
  const int64_t whole_rows = rows / kL * kL, whole_columns = columns / kL * kL;
  for (int64_t j = 0; j < whole_columns; j += kL) {
    for (int64_t i = 0; i < whole_rows; i += kL) {
      Vec<float> block[kL];
#pragma GCC unroll 16
      for (int n = 0; n < kL; ++n)
        block[n] = load(data + (j + n) * column_stride + i);
      transpose(block);
#pragma GCC unroll 16
      for (int n = 0; n < kL; ++n)
        store(out + (i + n) * out_stride + j, block[n]);
    }
    for (int64_t i = whole_rows; i < rows; ++i)
      for (int64_t n = j; n < j + kL; ++n)
        out[i * out_stride + n] = widened(data + n * column_stride + i);
  }
  return whole_columns;
}

/// out[i * out_stride + j] = m[first_row + i, first_column + j] for `rows` x `columns` elements, in the accumulator C.
template <class T, class C>
void stage_matrix(ConstMatrix m, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, C* out,
                  int64_t out_stride) {
  const T* data = row_of<T>(m, first_row) + first_column * m.column_stride;
  int64_t done = 0;
  if constexpr (kSame<C, float> && kSame<Accumulator<T>, float>) {
    if (m.row_stride == 1 && m.column_stride != 1)
      done = stage_transposed(data, m.column_stride, rows, columns, out, out_stride);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = data + i * m.row_stride;
    C* to = out + i * out_stride;
    int64_t j = done;
    if constexpr (kSame<Accumulator<T>, C>) {
      if (m.column_stride == 1)
        for (; j + kLanes<C> <= columns; j += kLanes<C>)
          store(to + j, load(row + j));
    }
    for (; j < columns; ++j)
      to[j] = static_cast<C>(widened(row + j * m.column_stride));
  }
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
