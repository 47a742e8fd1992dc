// Sizes that callers and launchers must agree on: pure functions of the shape.
#pragma once

#include "common/sizes.h"
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

}  // namespace pylora::lora
