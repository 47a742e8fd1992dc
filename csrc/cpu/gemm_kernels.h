// The kernels of gemm_cpu of one instruction set.
#pragma once

#include "cpu/gemm.h"

namespace pylora {

/// Rows that one pass over a transposed weight serves; their sums, f32 [rows, columns], are what the workspace holds.
constexpr int64_t kGemmBlockRows = 192;
/// Most rows that one pass over a weight as stored serves. The workspace holds their sums, unless y can.
constexpr int64_t kGemmDotRows = 128;
/// Most rows that are multiplied without packing the weight.
constexpr int64_t kGemvRows = 3;
/// Highest rank of a low-rank term beside them: v is staged on the stack.
constexpr int64_t kGemvRank = 512;
/// Columns are shared out in multiples of this: a tile of the widest instruction set.
constexpr int64_t kGemmColumnTile = 32;

constexpr int64_t gemm_sums_stride(int64_t columns) {
  return (columns + kGemmColumnTile - 1) / kGemmColumnTile * kGemmColumnTile;
}

/// Passes of about the same size.
constexpr int64_t gemm_dot_block_rows(int64_t rows) {
  const int64_t passes = (rows + kGemmDotRows - 1) / kGemmDotRows;
  return passes > 1 ? (rows + passes - 1) / passes : rows;
}

struct GemmKernels {
  /// Columns [begin, end) of y; begin is a multiple of kGemmColumnTile.
  using Gemm = void (*)(int64_t begin, int64_t end, const GemmArgs& args);
  // Indexed by DType; f64 has none.
  Gemm gemm[kNumDTypes];
  Gemm gemv[kNumDTypes];
};

struct GemmDotKernels {
  GemmKernels::Gemm dot[kNumDTypes];
};

}  // namespace pylora
