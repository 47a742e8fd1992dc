// The Lanczos kernels, written once and compiled per instruction set. All are bound by memory: a tile of four rows is
// dotted and then added up while it is in L1.
#include "cpu/simd/vec.h"
#include "lanczos/kernels.h"

namespace pylora::PYLORA_ISA {
namespace {

using lanczos::Kernels;
using lanczos::kGramRows;
using lanczos::kRowTile;

/// dots[r] = rows[r] · x, R rows at a time: two accumulators a row hide the latency of an FMA.
template <class C, int R>
void dot_rows(const C* rows, int64_t stride, int64_t columns, const C* x, C* dots) {
  constexpr int64_t kStep = 2 * kLanes<C>;
  Vec<C> sum[R][2] = {};
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) {
    const Vec<C> x0 = load(x + i), x1 = load(x + i + kLanes<C>);
    for (int r = 0; r < R; ++r) {
      sum[r][0] += load(rows + r * stride + i) * x0;
      sum[r][1] += load(rows + r * stride + i + kLanes<C>) * x1;
    }
  }
  for (; i < columns; i += kLanes<C>) {
    const int64_t count = min_of<int64_t>(columns - i, kLanes<C>);
    const bool whole = count == kLanes<C>;
    const Vec<C> x0 = whole ? load(x + i) : load_partial(x + i, count);
    for (int r = 0; r < R; ++r) {
      const C* p = rows + r * stride + i;
      sum[r][0] += (whole ? load(p) : load_partial(p, count)) * x0;
    }
  }
  for (int r = 0; r < R; ++r)
    dots[r] = horizontal_sum<C>(sum[r][0] + sum[r][1]);
}

/// x[i] += Σ_r factors[r] rows[r, i].
template <class C, int R>
void add_rows(const C* rows, int64_t stride, int64_t columns, const C* factors, C* x) {
  Vec<C> f[R];
  for (int r = 0; r < R; ++r)
    f[r] = splat(factors[r]);
  int64_t i = 0;
  for (; i + kLanes<C> <= columns; i += kLanes<C>) {
    Vec<C> sum = load(x + i);
    for (int r = 0; r < R; ++r)
      sum += f[r] * load(rows + r * stride + i);
    store(x + i, sum);
  }
  for (; i < columns; ++i)
    for (int r = 0; r < R; ++r)
      x[i] += factors[r] * rows[r * stride + i];
}

template <class C, int R>
double pass_rows(const C* rows, int64_t stride, int64_t columns, const C* v, C carry, C* left, C* sums) {
  C dots[R];
  dot_rows<C, R>(rows, stride, columns, v, dots);
  double squares = 0;
  for (int r = 0; r < R; ++r) {
    left[r] = carry == 0 ? dots[r] : dots[r] - carry * left[r];  // at first there is nothing in left
    squares += static_cast<double>(left[r]) * left[r];
  }
  add_rows<C, R>(rows, stride, columns, left, sums);
  return squares;
}

template <class C>
double pass(int64_t begin, int64_t end, ConstMatrix w, int64_t columns, const void* v, double carry, void* left,
            void* sums) {
  const C* x = static_cast<const C*>(v);
  C *u = static_cast<C*>(left), *out = static_cast<C*>(sums);
  for (int64_t i = 0; i < columns; ++i)
    out[i] = 0;
  double squares = 0;
  int64_t row = begin;
  for (; row + kRowTile <= end; row += kRowTile) {
    squares += pass_rows<C, kRowTile>(row_of<C>(w, row), w.row_stride, columns, x, C(carry), u + row, out);
  }
  for (; row < end; ++row)
    squares += pass_rows<C, 1>(row_of<C>(w, row), w.row_stride, columns, x, C(carry), u + row, out);
  return squares;
}

template <class C>
void project(int64_t begin, int64_t end, const void* basis, int64_t columns, const void* x, void* dots) {
  const C *rows = static_cast<const C*>(basis), *vector = static_cast<const C*>(x);
  C* out = static_cast<C*>(dots);
  int64_t j = begin;
  for (; j + kRowTile <= end; j += kRowTile)
    dot_rows<C, kRowTile>(rows + j * columns, columns, columns, vector, out + j);
  for (; j < end; ++j)
    dot_rows<C, 1>(rows + j * columns, columns, columns, vector, out + j);
}

template <class C>
void subtract(int64_t begin, int64_t end, const void* basis, int64_t vectors, int64_t columns, const void* dots,
              void* x) {
  const C *rows = static_cast<const C*>(basis) + begin, *factors = static_cast<const C*>(dots);
  C* out = static_cast<C*>(x) + begin;
  int64_t j = 0;
  for (; j + kRowTile <= vectors; j += kRowTile) {
    C negative[kRowTile];
    for (int64_t r = 0; r < kRowTile; ++r)
      negative[r] = -factors[j + r];
    add_rows<C, kRowTile>(rows + j * columns, columns, end - begin, negative, out);
  }
  for (; j < vectors; ++j) {
    const C negative = -factors[j];
    add_rows<C, 1>(rows + j * columns, columns, end - begin, &negative, out);
  }
}

template <class C>
void reduce(int64_t begin, int64_t end, const void* parts, int64_t num_parts, int64_t columns, void* x) {
  const C* rows = static_cast<const C*>(parts);
  C* out = static_cast<C*>(x);
  for (int64_t i = begin; i < end; ++i)
    out[i] = rows[i];
  for (int64_t p = 1; p < num_parts; ++p)
    for (int64_t i = begin; i < end; ++i)
      out[i] += rows[p * columns + i];
}

template <class C>
double squares(int64_t columns, const void* x) {
  // Sums in C are short: a run of them is added up in f64.
  constexpr int64_t kRun = 256;
  const C* p = static_cast<const C*>(x);
  double sum = 0;
  for (int64_t i = 0; i < columns; i += kRun) {
    C run;
    dot_rows<C, 1>(p + i, 0, min_of(kRun, columns - i), p + i, &run);
    sum += run;
  }
  return sum;
}

template <class C>
void scale(int64_t columns, const void* x, double factor, void* out) {
  for (int64_t i = 0; i < columns; ++i)
    static_cast<C*>(out)[i] = static_cast<C>(static_cast<const C*>(x)[i] * factor);
}

/// Vectors of X's row that a gram kernel works on, and rows of W: as many sums as hide an FMA's latency, and no more
/// than there are registers.
constexpr int kGramVecs = kVecBytes == 64 ? 1 : 2;
constexpr int kGramTile = kVecBytes == 64 ? static_cast<int>(kGramRows) : 4;
template <class C>
constexpr int64_t kPanel = kGramVecs * kLanes<C>;

/// products = rows · X, R rows of W and one panel of X.
template <class C, int R>
PYLORA_INLINE void gram_forth(const C* rows, int64_t stride, int64_t columns, const C* x,
                              Vec<C> (&products)[R][kGramVecs]) {
  for (int64_t k = 0; k < columns; ++k) {
    for (int v = 0; v < kGramVecs; ++v) {
      const Vec<C> right = load(x + k * kPanel<C> + v * kLanes<C>);
      for (int r = 0; r < R; ++r)
        products[r][v] += splat(rows[r * stride + k]) * right;
    }
  }
}

/// sums[k] += Σ_r rows[r, k] products[r] for K columns of W from k on.
template <class C, int R, int K>
PYLORA_INLINE void gram_back(const C* rows, int64_t stride, int64_t k, const Vec<C> (&products)[R][kGramVecs],
                             C* sums) {
  Vec<C> sum[K][kGramVecs];
  for (int i = 0; i < K; ++i)
    for (int v = 0; v < kGramVecs; ++v)
      sum[i][v] = load(sums + (k + i) * kPanel<C> + v * kLanes<C>);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < K; ++i)
      for (int v = 0; v < kGramVecs; ++v)
        sum[i][v] += splat(rows[r * stride + k + i]) * products[r][v];
  for (int i = 0; i < K; ++i)
    for (int v = 0; v < kGramVecs; ++v)
      store(sums + (k + i) * kPanel<C> + v * kLanes<C>, sum[i][v]);
}

template <class C, int R>
void gram_rows(const C* rows, int64_t stride, int64_t columns, int64_t panels, const C* x, C* sums) {
  constexpr int kColumns = 4 / kGramVecs;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t offset = panel * columns * kPanel<C>;
    Vec<C> products[R][kGramVecs] = {};
    gram_forth<C, R>(rows, stride, columns, x + offset, products);
    int64_t k = 0;
    for (; k + kColumns <= columns; k += kColumns)
      gram_back<C, R, kColumns>(rows, stride, k, products, sums + offset);
    for (; k < columns; ++k)
      gram_back<C, R, 1>(rows, stride, k, products, sums + offset);
  }
}

template <class C>
void gram(int64_t begin, int64_t end, ConstMatrix w, int64_t columns, int64_t panels, const void* x, void* sums) {
  const C* right = static_cast<const C*>(x);
  C* out = static_cast<C*>(sums);
  for (int64_t i = 0; i < panels * columns * kPanel<C>; ++i)
    out[i] = 0;
  int64_t row = begin;
  for (; row + kGramTile <= end; row += kGramTile)
    gram_rows<C, kGramTile>(row_of<C>(w, row), w.row_stride, columns, panels, right, out);
  for (; row < end; ++row)
    gram_rows<C, 1>(row_of<C>(w, row), w.row_stride, columns, panels, right, out);
}

}  // namespace

extern const Kernels lanczos_kernels;
const Kernels lanczos_kernels = {
    {pass<float>, pass<double>},     {project<float>, project<double>}, {subtract<float>, subtract<double>},
    {reduce<float>, reduce<double>}, {squares<float>, squares<double>}, {scale<float>, scale<double>},
    {gram<float>, gram<double>},     {kPanel<float>, kPanel<double>},
};

}  // namespace pylora::PYLORA_ISA
