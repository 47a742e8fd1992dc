// The kernels of segments.h of one instruction set. Each works on positions [begin, end) of one segment, or on columns
// [begin, end) of one segment's sums. "C" is the accumulator: f32, or f64 for f64 activations.
#pragma once

#include "cpu/segments.h"

namespace pylora {

struct SegmentKernels {
  /// C v[t, r] = scaling * sum_i drop(x)[t, i] factor[r, i]; factor is [rank, width] of dtype `factor_dtype`.
  using Shrink = void (*)(int64_t begin, int64_t end, const SegmentPlan& plan, ConstMatrix x, int64_t width,
                          ConstMatrix factor, DType factor_dtype, int64_t rank, double scaling, const Dropout& dropout,
                          void* v, int64_t v_stride);
  /// y[t, o] += drop(scaling * sum_r v[t, r] factor[r, o]); factor is [rank, width].
  using Expand = void (*)(int64_t begin, int64_t end, const SegmentPlan& plan, const void* v, int64_t v_stride,
                          ConstMatrix factor, DType factor_dtype, int64_t rank, double scaling, const Dropout& dropout,
                          MutableMatrix y, int64_t width);
  /// C sums[r, i] += scaling * sum_t v[t, r] drop(x)[t, i] over the positions [first, last), for columns [begin, end);
  /// begin is a multiple of 64.
  using Outer = void (*)(int64_t begin, int64_t end, int64_t first, int64_t last, const SegmentPlan& plan,
                         const void* v, int64_t v_stride, int64_t rank, ConstMatrix x, int64_t width, double scaling,
                         const Dropout& dropout, void* sums);

  // Indexed by the activations' DType.
  Shrink shrink[kNumDTypes];
  Expand expand[kNumDTypes];
  Outer outer[kNumDTypes];
};

/// Of tokens whose x is one-hot.
struct SegmentLookupKernels {
  /// C v[t, r] = factor[r, columns[t]].
  using LookUp = void (*)(int64_t begin, int64_t end, const SegmentPlan& plan, const int64_t* columns,
                          ConstMatrix factor, DType factor_dtype, int64_t rank, void* v, int64_t v_stride);
  /// C sums[r, columns[t]] += g[t, r] over the positions [first, last), for ranks [begin, end); tokens with the column
  /// `frozen_column` are passed over.
  using AddUp = void (*)(int64_t begin, int64_t end, int64_t first, int64_t last, const SegmentPlan& plan,
                         const void* g, int64_t g_stride, const int64_t* columns, int64_t frozen_column, int64_t width,
                         void* sums);

  // Indexed by the activations' DType.
  LookUp look_up[kNumDTypes];
  AddUp add_up[kNumDTypes];
};

}  // namespace pylora
