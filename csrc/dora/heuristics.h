// Sizes that callers and launchers must agree on: pure functions of the shape.
#pragma once

#include "common/sizes.h"
#include "cuda/segments.h"
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

// CUDA. Workspaces begin with counters.

/// Rows of W, and columns at the most, of a block's tile.
constexpr int64_t kNormRows = 64, kNormColumns = 128;

constexpr int64_t norm_row_blocks(const NormsArgs& args) { return (args.out_features + kNormRows - 1) / kNormRows; }
/// Parts of the width that blocks share.
constexpr int norm_splits(const NormsArgs& args) {
  return cuda::splits_of(norm_row_blocks(args), (args.in_features + 4 * kNormColumns - 1) / (4 * kNormColumns));
}
constexpr int64_t norms_counter_bytes_cuda(const NormsArgs& args) { return align_up(norm_row_blocks(args) * 4); }
/// Planes of two sums a row: of the squares of W + scaling * B A, and of W.
constexpr int64_t norms_workspace_bytes_cuda(const NormsArgs& args) {
  return norms_counter_bytes_cuda(args) + norm_row_blocks(args) * norm_splits(args) * kNormRows * 2 * 8;
}

/// Tokens that one thread of scale_backward sums over, as on the CPU, and columns of a block at the least.
constexpr int64_t kScaleTokens = 64, kScaleThreads = 128;

constexpr int64_t scale_token_blocks(int64_t num_tokens) {
  return num_tokens > 0 ? (num_tokens + kScaleTokens - 1) / kScaleTokens : 1;
}
constexpr int64_t scale_counter_bytes_cuda(const ScaleBackwardArgs& args) {
  return align_up((args.out_features + kScaleThreads - 1) / kScaleThreads * 4);
}
constexpr int64_t scale_backward_workspace_bytes_cuda(const ScaleBackwardArgs& args) {
  return scale_counter_bytes_cuda(args) +
         scale_token_blocks(args.num_tokens) * args.out_features * dtype_bytes(accumulator_dtype(args.dtype));
}

}  // namespace pylora::dora
