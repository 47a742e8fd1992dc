// Sizes that callers and launchers must agree on: pure functions of the shape.
#pragma once

#include "common/sizes.h"
#include "cuda/segments.h"
#include "lora/lora.h"

namespace pylora::lora {

/// Forwards of up to this many tokens, which csrc/cpu/gemm.h serves, never use torch's products: a row then has the
/// same bits whatever rows are beside it.
constexpr int64_t kOwnRows = 192;

/// Bytes of a [rows, columns] block of accumulators.
constexpr int64_t block_bytes(const Shape& shape, int64_t rows, int64_t columns) {
  return align_up(rows * columns * dtype_bytes(accumulator_dtype(shape.dtype)));
}

/// Whether kernels can read a factor [rank, width] where it lies: contiguous rows of accumulators.
constexpr bool is_rows(const Shape& shape, ConstMatrix factor, int64_t width) {
  return shape.factor_dtype == accumulator_dtype(shape.dtype) && factor.column_stride == 1 &&
         (factor.row_stride == width || shape.rank == 1);
}

constexpr int64_t shrink_workspace_bytes(const ShrinkArgs& args) {
  const Shape& shape = args.shape;
  return is_rows(shape, args.a, shape.in_features) ? 0 : block_bytes(shape, shape.rank, shape.in_features);
}

/// Both factors as [rank, width] rows of accumulators.
constexpr int64_t forward_workspace_bytes(const Shape& shape) {
  return block_bytes(shape, shape.rank, shape.in_features) + block_bytes(shape, shape.rank, shape.out_features);
}

/// The factors, g, and the sums of da and db before they are rounded.
constexpr int64_t backward_workspace_bytes(const Shape& shape) {
  return 2 * forward_workspace_bytes(shape) + block_bytes(shape, shape.num_tokens, shape.rank);
}

// CUDA. Workspaces begin with counters, which the launches of a call share.

/// Most tokens whose shrink and expand are one launch: beyond, groups of eight read the factors too often.
constexpr int64_t kDecodeTokens = 16;

constexpr bool decodes_cuda(const Shape& shape, const Dropout& dropout) {
  return shape.num_tokens <= kDecodeTokens && !dropout.active() && dtype_bytes(shape.dtype) == 2 &&
         shape.factor_dtype == shape.dtype;
}

constexpr int shrink_splits_cuda(const Shape& shape, int64_t width) {
  const int64_t items = cuda::plan_of_one_slot(shape.num_tokens).max_items;
  return cuda::shrink_splits(items, shape.rank, 1, width);
}
constexpr int64_t shrink_planes_cuda(const Shape& shape, int64_t width) {
  const int64_t items = cuda::plan_of_one_slot(shape.num_tokens).max_items;
  return cuda::shrink_plane_bytes(items, cuda::shrink_rank_tiles(shape.rank, 1), shrink_splits_cuda(shape, width),
                                  shape.dtype);
}
constexpr int outer_splits_cuda(const Shape& shape, int64_t width) {
  return cuda::outer_splits(cuda::plan_of_one_slot(shape.num_tokens).max_items,
                            cuda::outer_tiles(1, shape.rank, width, shape.dtype), shape.rank);
}
constexpr int64_t outer_planes_cuda(const Shape& shape, int64_t width) {
  return cuda::outer_plane_bytes(cuda::outer_tiles(1, shape.rank, width, shape.dtype), outer_splits_cuda(shape, width),
                                 shape.dtype);
}
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/// Bytes at the beginning of a workspace that are zero before a call, and after it.
constexpr int64_t counter_bytes_cuda(const Shape& shape) {
  const int64_t items = cuda::plan_of_one_slot(shape.num_tokens).max_items;
  const int64_t widest = larger(shape.in_features, shape.out_features);
  const int64_t count = larger(larger(cuda::decode_counters(cuda::decode_groups(shape.num_tokens)),
                                      cuda::shrink_counters(items, cuda::shrink_rank_tiles(shape.rank, 1))),
                               cuda::outer_tiles(1, shape.rank, widest, shape.dtype));
  return align_up(count * static_cast<int64_t>(sizeof(int32_t)));
}
constexpr int64_t forward_workspace_bytes_cuda(const Shape& shape) {
  const int64_t planes =
      decodes_cuda(shape, Dropout{})
          ? cuda::decode_plane_bytes(cuda::decode_groups(shape.num_tokens), shape.rank, 1, shape.in_features)
          : 0;
  return counter_bytes_cuda(shape) + align_up(larger(planes, shrink_planes_cuda(shape, shape.in_features)));
}
/// The planes of the backward's launches, which follow one another in the same memory.
constexpr int64_t backward_planes_cuda(const Shape& shape) {
  return align_up(
      larger(shrink_planes_cuda(shape, shape.out_features),
             larger(outer_planes_cuda(shape, shape.in_features), outer_planes_cuda(shape, shape.out_features))));
}
/// g comes last.
constexpr int64_t backward_workspace_bytes_cuda(const Shape& shape) {
  return counter_bytes_cuda(shape) + backward_planes_cuda(shape) + block_bytes(shape, shape.num_tokens, shape.rank);
}

}  // namespace pylora::lora
