// Sizes that callers and launchers must agree on: pure functions of the shape.
#pragma once

#include "dora/dora.h"

namespace pylora::dora {

constexpr int64_t kWorkspaceAlignment = 64;
/// Columns of W whose part of A, [rank, kPanelColumns], serves a block of rows from cache.
constexpr int64_t kPanelColumns = 256;

constexpr int64_t align_up(int64_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

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

/// Least work of a thread, in multiply-adds: waking a thread costs about 5 us, in which one does about 200,000.
constexpr int64_t kGrainWork = 200000;

constexpr int64_t grain(int64_t work_per_item) { return work_per_item > 0 ? 1 + kGrainWork / work_per_item : 1; }

}  // namespace pylora::dora
