// The kernels of one instruction set. Factors and v come as contiguous rows of accumulators ("C" below: f32, or f64
// for f64 tensors), so that a kernel has one storage type; each works on a range, and the launcher shares out the
// ranges.
#pragma once

#include "lora/lora.h"

namespace pylora::lora {

struct Kernels {
  /// C out[rows, columns] = m, any strides.
  using Convert = void (*)(ConstMatrix m, int64_t rows, int64_t columns, void* out);
  /// out[columns, rows] = transpose of C m[rows, columns], rounded.
  using Round = void (*)(const void* m, int64_t rows, int64_t columns, bool transpose, void* out);
  /// C v[t, r] = scaling * sum_i drop(x)[t, i] factor[r, i] for tokens [begin, end).
  using Shrink = void (*)(int64_t begin, int64_t end, ConstMatrix x, int64_t width, const void* factor, int64_t rank,
                          double scaling, const Dropout& dropout, void* v);
  /// y[t, o] += drop(scaling * sum_r v[t, r] factor[r, o]) for tokens [begin, end).
  using Expand = void (*)(int64_t begin, int64_t end, const void* v, const void* factor, int64_t rank, double scaling,
                          const Dropout& dropout, MutableMatrix y, int64_t width);
  /// C sums[r, i] = scaling * sum_t v[t, r] drop(x)[t, i] for columns [begin, end); begin is a multiple of 64.
  using Outer = void (*)(int64_t begin, int64_t end, const void* v, int64_t rank, ConstMatrix x, int64_t num_tokens,
                         int64_t width, double scaling, const Dropout& dropout, void* sums);
  /// out = drop(x) for tokens [begin, end).
  using Drop = void (*)(int64_t begin, int64_t end, ConstMatrix x, int64_t width, const Dropout& dropout,
                        MutableMatrix out);

  // Indexed by DType. Factors of any type meet accumulators of either: [factor][accumulator is f64].
  Convert convert[kNumDTypes][2];
  Round round[kNumDTypes][2];
  Shrink shrink[kNumDTypes];
  Expand expand[kNumDTypes];
  Outer outer[kNumDTypes];
  Drop drop[kNumDTypes];
};

}  // namespace pylora::lora
