// A token that has a segment to itself, as each has in a decode step of many adapters. Its factors are read once, from
// memory, and little else takes time: they are read as a few long runs, each of many neighbouring rows, which the
// processor follows further ahead than rows side by side. (rank 16, width 512, f32, one core of an AMD EPYC: 23 GB/s
// instead of 18)
#pragma once

#include "cpu/simd/vec.h"

namespace pylora::PYLORA_ISA {
namespace {

constexpr int64_t kShrinkChunk = 512;  // columns that are summed apart; 16 ranks of them are 32 KB of f32

/// v[m][rank + r] += x[m] . factor[r] for M tokens and R rows, `count` columns.
template <class C, int M, int R>
void shrink_tile(const C* const* x, const C* factor, int64_t factor_stride, int64_t count, C* const* v, int64_t rank) {
  Vec<C> sum[M][R] = {};
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) {
    Vec<C> row[M];
    for (int m = 0; m < M; ++m)
      row[m] = load(x[m] + i);
    for (int r = 0; r < R; ++r) {
      const Vec<C> f = load(factor + r * factor_stride + i);
      for (int m = 0; m < M; ++m)
        sum[m][r] += row[m] * f;
    }
  }
  if (i < count) {
    for (int m = 0; m < M; ++m) {
      const Vec<C> row = load_partial(x[m] + i, count - i);
      for (int r = 0; r < R; ++r)
        sum[m][r] += row * load_partial(factor + r * factor_stride + i, count - i);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r)
      v[m][rank + r] += horizontal_sum<C>(sum[m][r]);
}

/// v[r * v_step] = x . factor[r] for R rows, with the bits of any other tile.
template <class C, int R>
void shrink_rows(const C* x, const C* factor, int64_t factor_stride, int64_t width, C* v, int64_t v_step) {
  C sums[R] = {};
  C* const to = sums;
  for (int64_t k = 0; k < width; k += kShrinkChunk) {
    const C* const from = x + k;
    shrink_tile<C, 1, R>(&from, factor + k, factor_stride, width - k < kShrinkChunk ? width - k : kShrinkChunk, &to, 0);
  }
  for (int r = 0; r < R; ++r)
    v[r * v_step] = sums[r];
}

/// v = scaling * x factor^T for all ranks of one token: four runs of rows.
template <class C>
void shrink_token(const C* x, const C* factor, int64_t factor_stride, int64_t width, int64_t rank, C scaling, C* v) {
  const int64_t run = rank / 4;
  for (int64_t r = 0; r < run; ++r)
    shrink_rows<C, 4>(x, factor + r * factor_stride, run * factor_stride, width, v + r, run);
  for (int64_t r = 4 * run; r < rank; ++r)
    shrink_rows<C, 1>(x, factor + r * factor_stride, factor_stride, width, v + r, 1);
  for (int64_t r = 0; r < rank; ++r)
    v[r] *= scaling;
}

/// The order in which expand adds up ranks, everywhere alike: one of the first half, one of the second, and so on.
class RankOrder {
 public:
  explicit RankOrder(int64_t ranks) : other_((ranks + 1) / 2) {}
  int64_t next() {
    const int64_t rank = rank_;
    rank_ = other_;
    other_ = rank + 1;
    return rank;
  }

 private:
  int64_t rank_ = 0, other_;
};

constexpr int64_t kTokenColumns = 2048;  // whose sums stay in L1

/// sums[o] += v[r] * rows[r][o] for R rows, in their order. `columns` may end within a vector; sums has room for all of
/// it.
template <class C, int R>
void expand_rows(const C (&v)[R], const C* const (&rows)[R], int64_t columns, C* sums) {
  Vec<C> value[R];
  for (int r = 0; r < R; ++r)
    value[r] = splat(v[r]);
  int64_t o = 0;
#pragma GCC unroll 2
  for (; o + kLanes<C> <= columns; o += kLanes<C>) {
    Vec<C> sum = load(sums + o);
    for (int r = 0; r < R; ++r)
      sum += value[r] * load(rows[r] + o);
    store(sums + o, sum);
  }
  if (o < columns) {
    Vec<C> sum = load(sums + o);
    for (int r = 0; r < R; ++r)
      sum += value[r] * load_partial(rows[r] + o, columns - o);
    store(sums + o, sum);
  }
}

/// y += scaling * v factor for one token, with the bits of any other tile: two runs of rows.
template <class T>
void expand_token(const Accumulator<T>* v, int64_t ranks, Accumulator<T> scaling, const Accumulator<T>* factor,
                  int64_t factor_stride, T* y, int64_t width) {
  using C = Accumulator<T>;
  alignas(64) C sums[kTokenColumns];
  for (int64_t c = 0; c < width; c += kTokenColumns) {
    const int64_t columns = width - c < kTokenColumns ? width - c : kTokenColumns;
    for (int64_t o = 0; o < columns; o += kLanes<C>)
      store(sums + o, Vec<C>{});
    RankOrder order(ranks);
    int64_t done = 0;
    for (; done + 2 <= ranks; done += 2) {
      const int64_t first = order.next(), second = order.next();
      expand_rows<C, 2>({v[first], v[second]},
                        {factor + first * factor_stride + c, factor + second * factor_stride + c}, columns, sums);
    }
    if (done < ranks) {
      const int64_t last = order.next();
      expand_rows<C, 1>({v[last]}, {factor + last * factor_stride + c}, columns, sums);
    }
    int64_t o = 0;
    for (; o + kLanes<C> <= columns; o += kLanes<C>)
      store(y + c + o, load(y + c + o) + splat(scaling) * load(sums + o));
    if (o < columns) {
      const Vec<C> before = load_partial(y + c + o, columns - o);
      store_partial(y + c + o, before + splat(scaling) * load(sums + o), columns - o);
    }
  }
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
