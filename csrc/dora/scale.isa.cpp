// The kernels of DoRA's factor on an output and its backward, written once and compiled per instruction set.
#include "cpu/simd/stage.h"
#include "dora/kernels.h"

namespace pylora::PYLORA_ISA {
namespace {

using dora::ScaleKernels;

template <class M, class C>
void factor(const void* magnitude, const double* norms, int64_t first, int64_t count, void* factor_out,
            void* norm_out) {
  using A = Accumulator<M>;
  const M* m = static_cast<const M*>(magnitude) + first;
  C* factors = static_cast<C*>(factor_out);
  C* rounded = static_cast<C*>(norm_out);
  if constexpr (kSame<M, C>) {  // nothing to convert: a loop that the compiler turns into vectors
    for (int64_t i = 0; i < count; ++i) {
      const C norm = static_cast<C>(norms[first + i]), divisor = norm == 0 ? C(1) : norm;
      rounded[i] = divisor;
      factors[i] = m[i] / divisor;
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int64_t n = min_of<int64_t>(kLanes<A>, count - i);
    A norm[kLanes<A>] = {}, magnitudes[kLanes<A>];
    for (int64_t j = 0; j < n; ++j)
      norm[j] = static_cast<A>(norms[first + i + j]);
    if constexpr (!kSame<M, A>) {  // through the storage type: a magnitude that was a norm gives a factor of 1
      M stored[kLanes<A>];
      store(stored, load(norm));
      store(norm, load(stored));
    }
    store(magnitudes, n == kLanes<A> ? load(m + i) : load_partial(m + i, n));
    for (int64_t j = 0; j < n; ++j) {
      const C divisor = norm[j] == 0 ? C(1) : static_cast<C>(norm[j]);
      rounded[i + j] = divisor;
      factors[i + j] = static_cast<C>(magnitudes[j]) / divisor;
    }
  }
}

template <class T>
void scale_row(const Accumulator<T>* factors, const T* z, const T* rest, const T* bias, int64_t count, T* y) {
  using C = Accumulator<T>;
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) {
    Vec<C> value = load(factors + i) * load(z + i);
    if (rest) value += load(rest + i);
    if (bias) value += load(bias + i);
    store(y + i, value);
  }
  if (i < count) {
    const int64_t left = count - i;
    Vec<C> value = load_partial(factors + i, left) * load_partial(z + i, left);
    if (rest) value += load_partial(rest + i, left);
    if (bias) value += load_partial(bias + i, left);
    store_partial(y + i, value, left);
  }
}

template <class T>
void scale(int64_t begin, int64_t end, const dora::ScaleArgs& args, ScaleKernels::Factor factor) {
  using C = Accumulator<T>;
  constexpr int64_t kColumns = 512;
  alignas(64) C factors[kColumns], norm[kColumns];
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t c = 0; c < args.out_features; c += kColumns) {
    const int64_t columns = min_of(kColumns, args.out_features - c);
    factor(args.magnitude, args.norms, c, columns, factors, norm);
    for (int64_t t = begin; t < end; ++t)
      scale_row(factors, row_of<T>(args.z, t) + c, args.rest.data ? row_of<T>(args.rest, t) + c : nullptr,
                bias ? bias + c : nullptr, columns, row_of<T>(args.y, t) + c);
  }
}

/// One token's part: dz = factors * dy (dz null: not wanted), sums += dy * z (z null: not wanted).
template <class T>
void scale_row_backward(const Accumulator<T>* factors, const T* dy, const T* z, int64_t count, T* dz,
                        Accumulator<T>* sums) {
  using C = Accumulator<T>;
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) {
    const Vec<C> value = load(dy + i);
    if (z) store(sums + i, load(sums + i) + value * load(z + i));
    if (dz) store(dz + i, load(factors + i) * value);
  }
  if (i < count) {
    const int64_t left = count - i;
    const Vec<C> value = load_partial(dy + i, left);
    if (z) store_partial(sums + i, load_partial(sums + i, left) + value * load_partial(z + i, left), left);
    if (dz) store_partial(dz + i, load_partial(factors + i, left) * value, left);
  }
}

template <class T>
void scale_backward(int64_t begin, int64_t end, const dora::ScaleBackwardArgs& args, ScaleKernels::Factor factor) {
  using C = Accumulator<T>;
  constexpr int64_t kTokens = 64;
  alignas(64) C factors[dora::kScaleColumns], norm[dora::kScaleColumns];
  for (int64_t c = begin; c < end; c += dora::kScaleColumns) {
    const int64_t columns = min_of(dora::kScaleColumns, end - c);
    factor(args.magnitude, args.norms, c, columns, factors, norm);
    alignas(64) C total[dora::kScaleColumns] = {};
    for (int64_t t = 0; t < args.num_tokens; t += kTokens) {
      alignas(64) C sums[dora::kScaleColumns] = {};
      for (int64_t i = t; i < min_of(t + kTokens, args.num_tokens); ++i)
        scale_row_backward(factors, row_of<T>(args.dy, i) + c, args.dmagnitude ? row_of<T>(args.z, i) + c : nullptr,
                           columns, args.dz.data ? row_of<T>(args.dz, i) + c : nullptr, sums);
      for (int64_t i = 0; i < columns; ++i)
        total[i] += sums[i];
    }
    if (C* out = static_cast<C*>(args.dmagnitude)) {
      for (int64_t i = 0; i < columns; ++i)
        out[c + i] = total[i] / norm[i];
    }
  }
}

}  // namespace

extern const ScaleKernels dora_scale_kernels;
const ScaleKernels dora_scale_kernels = {
    {{factor<float, float>, factor<float, double>},
     {factor<bf16, float>, factor<bf16, double>},
     {factor<f16, float>, factor<f16, double>},
     {factor<double, float>, factor<double, double>}},
    {scale<float>, scale<bf16>, scale<f16>, scale<double>},
    {scale_backward<float>, scale_backward<bf16>, scale_backward<f16>, scale_backward<double>},
};

}  // namespace pylora::PYLORA_ISA
