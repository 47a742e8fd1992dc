// Dense products of activations with a weight, y = factor (x w^T + scaling v b^T) + bias: a layer's base product, with an
// adapter's low-rank one as `rank` more columns of x and w. What the CPU ops use where torch's own product is slow on
// this CPU (16-bit types without 16-bit instructions, few rows); `gemm_is_better` says where that is.
//
// Numerics. Sums are f32: of a weight as it is stored lane by lane along blocks of at most 640 of depth and rank, the
// lanes then added in pairs; of a transposed one along blocks of 256 in order, then along the rank. The bias is added in
// f32 and y rounded once.
// A row of y depends on that row of x alone and has the same bits for any number of threads and of other rows, except
// that up to three rows take another path (gemv) than more.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/matrix.h"
#include "common/status.h"

namespace pylora {

/// scaling * v b^T.
struct LowRankTerm {
  int64_t rank = 0;  // 0: no such term
  float scaling = 1;
  const float* v = nullptr;  // [rows, rank], contiguous
  ConstMatrix b;             // [columns, rank], column stride 1
  DType dtype = DType::f32;  // of b: f32, or that of x and w
};

struct GemmArgs {
  int64_t rows = 0;     // of x and y
  int64_t columns = 0;  // of y
  int64_t depth = 0;
  DType dtype = DType::f32;  // of all of them; f64 is unsupported
  ConstMatrix x;             // [rows, depth], column stride 1
  ConstMatrix w;             // [columns, depth], either stride 1: a weight as it is stored, or transposed
  LowRankTerm low_rank;
  const float* factor = nullptr;  // [columns], of the sums in f32, or null
  const void* bias = nullptr;     // [columns], or null
  MutableMatrix y;                // [rows, columns], column stride 1; what it held is not used
  void* workspace = nullptr;      // gemm_workspace_bytes(args), aligned to 64
};

/// Whether gemm_cpu takes these arguments and is expected to beat torch's product on this CPU.
bool gemm_is_better(const GemmArgs& args);
/// Whether gemm_cpu can add a term of this rank with a b of this dtype, column stride 1, to these products.
bool gemm_takes_low_rank(const GemmArgs& args, int64_t rank, DType b_dtype);
int64_t gemm_workspace_bytes(const GemmArgs& args);
Status gemm_cpu(const Context& context, const GemmArgs& args);

}  // namespace pylora
