// Sizes that callers and launchers must agree on: pure functions of the shape.
#pragma once

#include "common/sizes.h"
#include "dora/dora.h"

namespace pylora::dora {

/// Columns of W whose part of A, [rank, kPanelColumns], serves a block of rows from cache.
constexpr int64_t kPanelColumns = 256;

constexpr int64_t num_panels(int64_t in_features) { return (in_features + kPanelColumns - 1) / kPanelColumns; }

/// A in panels, accumulators, zeros beyond its last column.
constexpr int64_t panels_bytes(const NormsArgs& args) {
  return align_up(num_panels(args.in_features) * args.rank * kPanelColumns *
                  dtype_bytes(accumulator_dtype(args.dtype)));
}

/// scaling * B as contiguous rows of accumulators.
constexpr int64_t coefficients_bytes(const NormsArgs& args) {
  return align_up(args.out_features * args.rank * dtype_bytes(accumulator_dtype(args.dtype)));
}

/// Numbers between the rows of A A^T, which end in zeros: tiles of it have no edge.
constexpr int64_t gram_stride(int64_t rank) { return (rank + 31) / 32 * 32; }

constexpr int64_t gram_bytes(const NormsArgs& args) {
  return align_up(args.rank * gram_stride(args.rank) * dtype_bytes(accumulator_dtype(args.dtype)));
}

constexpr int64_t norms_workspace_bytes(const NormsArgs& args) {
  return panels_bytes(args) + coefficients_bytes(args) + gram_bytes(args);
}

/// Up to these, A goes through the base product as further rows of x. Width 2048, 64 rows, one thread: rank 16 takes
/// 9.1 ms so and 9.9 with a pass of its own, rank 64 18.0 and 16.2; rank 16 with 512 rows 67.9 and 68.4, at width 1024
/// 14.5 and 13.2.
constexpr int64_t kStackedRank = 32, kStackedRows = 256;

}  // namespace pylora::dora
