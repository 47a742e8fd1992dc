// Dense products of activations with a weight: y = x w^T + bias. What the CPU ops use where torch's own product is
// slow on this CPU (16-bit types without 16-bit instructions, few rows); `gemm_is_better` says where that is.
//
// Numerics. Sums are f32, along the depth in blocks of 256 and in order; the bias is added in f32 and y rounded once.
// A row of y depends on that row of x alone and has the same bits for any number of threads and of other rows, except
// that up to three rows take another path (gemv) than more.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/matrix.h"
#include "common/status.h"

namespace pylora {

struct GemmArgs {
  int64_t rows = 0;     // of x and y
  int64_t columns = 0;  // of y
  int64_t depth = 0;
  DType dtype = DType::f32;    // of all of them; f64 is unsupported
  ConstMatrix x;               // [rows, depth], column stride 1
  ConstMatrix w;               // [columns, depth], either stride 1: a weight as it is stored, or transposed
  const void* bias = nullptr;  // [columns], or null
  MutableMatrix y;             // [rows, columns], column stride 1; written, not read
  void* workspace = nullptr;   // gemm_workspace_bytes(args), aligned to 64
};

/// Whether gemm_cpu takes these arguments and is expected to beat torch's product on this CPU.
bool gemm_is_better(const GemmArgs& args);
int64_t gemm_workspace_bytes(const GemmArgs& args);
Status gemm_cpu(const Context& context, const GemmArgs& args);

}  // namespace pylora
