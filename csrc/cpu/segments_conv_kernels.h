// The kernels of segments_conv.h of one instruction set. "C" is the accumulator of the activations.
#pragma once

#include "cpu/segments_conv.h"

namespace pylora {

/// Positions that a call works on: as many as the kernels' tiles and the near cache like.
constexpr int64_t kConvPositions = 128;

/// Factors as the kernels read them.
struct PackedFactors {
  const void* a = nullptr;  // C [in_channels * taps, rank]
  const void* b = nullptr;  // C [rank / groups, out_channels]
};

struct SegmentConvKernels {
  /// C out[column, row] = factor[row, column] for all of a [rows, columns] matrix.
  using Pack = void (*)(ConstMatrix factor, DType factor_dtype, int64_t rows, int64_t columns, void* out);
  /// v of one row of the batch at output positions [begin, end), at most kConvPositions.
  using Shrink = void (*)(const SegmentConv& args, int64_t row, int64_t rank, const void* packed_a, int64_t begin,
                          int64_t end);
  /// y of the same.
  using Expand = void (*)(const SegmentConv& args, int64_t row, const SegmentSlot& slot, const void* packed_b,
                          int64_t begin, int64_t end);

  // Indexed by the activations' DType.
  Pack pack[kNumDTypes];
  Shrink shrink[kNumDTypes];
  Expand expand[kNumDTypes];
};

}  // namespace pylora
