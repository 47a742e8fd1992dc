// dora: the norms of the rows of W + scaling * B A, and the factor magnitude / norm on a layer's output, with its
// backward. The products themselves are those of the base layer and of lora.
//
//   norms[o]  = |W[o, :] + scaling * B[o, :] A|
//   factor[o] = magnitude[o] / norms[o]               the norm rounded to magnitude's dtype; divided by 1 where it is 0
//   y         = factor * z + rest + bias              z = drop(x) W^T + scaling * v B^T, rest = (x - drop(x)) W^T
//
// and for the backward, with the norms as constants (the paper's section 4.3),
//
//   dz         = factor * dy
//   dmagnitude = sum over tokens of dy * z / norms
//
// Numerics. f32 stands for f64 where W (or the activations) are f64. norms_cpu forms each element of W + scaling * B A
// in f32 and sums squares in f32 over 256 columns, these in f64: a relative error of a few 1e-7. norms_from_cross_cpu
// puts |W|^2 + 2 scaling rowdot(W A^T, B) + scaling^2 rowdot(B (A A^T), B) together in f64 from f32 sums. Both compute a
// row again in f64, element by element, where less than kCancelled of |W[o, :]|^2 is left. y is rounded once from f32;
// dmagnitude is summed in f32 over blocks of 64 tokens, in order. All results have the same bits for any number of
// threads.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/matrix.h"
#include "common/status.h"

namespace pylora::dora {

/// Where less of a row's squared norm is left, B A has cancelled the row of W and the sums above have lost it.
constexpr double kCancelled = 1e-3;

/// squares[o] = |W[o, :]|^2
struct SquaresArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  DType dtype = DType::f32;
  ConstMatrix weight;  // [out_features, in_features], any strides
  double* squares = nullptr;
};

struct NormsArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  int64_t rank = 0;
  DType dtype = DType::f32;         // weight
  DType factor_dtype = DType::f32;  // a, b
  double scaling = 1;
  ConstMatrix
      weight;     // [out_features, in_features], any strides; in norms_from_cross_cpu read where rows have cancelled
  ConstMatrix a;  // [rank, in_features], any strides
  ConstMatrix b;  // [out_features, rank], any strides
  double* norms = nullptr;    // out
  void* workspace = nullptr;  // norms_workspace_bytes(args), aligned to 64
};

/// What a caller that has W A^T and |W|^2 already saves: the pass over W.
struct CrossArgs {
  NormsArgs norms;
  ConstMatrix cross;                // A W^T, [rank, out_features], accumulators, column stride 1
  const double* squares = nullptr;  // of SquaresArgs
};

struct FactorArgs {
  int64_t out_features = 0;
  DType dtype = DType::f32;            // of the activations
  DType magnitude_dtype = DType::f32;  // magnitude
  const void* magnitude = nullptr;     // [out_features]
  const double* norms = nullptr;       // [out_features]
  void* factor = nullptr;              // out: [out_features] accumulators
};

struct ScaleArgs {
  int64_t num_tokens = 0;
  int64_t out_features = 0;
  DType dtype = DType::f32;            // z, rest, bias, y
  DType magnitude_dtype = DType::f32;  // magnitude
  const void* magnitude = nullptr;     // [out_features]
  const double* norms = nullptr;       // [out_features]
  ConstMatrix z;                       // [num_tokens, out_features], column stride 1, as all below
  ConstMatrix rest;                    // null: none
  const void* bias = nullptr;          // [out_features], or null
  MutableMatrix y;                     // may be z
};

struct ScaleBackwardArgs {
  int64_t num_tokens = 0;
  int64_t out_features = 0;
  DType dtype = DType::f32;
  DType magnitude_dtype = DType::f32;
  const void* magnitude = nullptr;
  const double* norms = nullptr;
  ConstMatrix dy;
  ConstMatrix z;               // read for dmagnitude alone
  MutableMatrix dz;            // null: not wanted
  void* dmagnitude = nullptr;  // [out_features] accumulators; null: not wanted
  void* workspace = nullptr;   // CUDA: scale_backward_workspace_bytes_cuda(args), aligned to 64
};

Status squares_cpu(const Context& context, const SquaresArgs& args);
Status norms_cpu(const Context& context, const NormsArgs& args);
Status norms_from_cross_cpu(const Context& context, const CrossArgs& args);
Status factor_cpu(const FactorArgs& args);
Status scale_cpu(const Context& context, const ScaleArgs& args);
Status scale_backward_cpu(const Context& context, const ScaleBackwardArgs& args);
/// Queued on context.stream. norms_cuda forms elements as norms_cpu does and sums their squares in f32 over 128 columns
/// (by FMA 64), these in f64. Workspaces begin with norms_counter_bytes_cuda and scale_counter_bytes_cuda bytes that are
/// zero before a call, and after it. z, rest and dy have a column stride of 1.
Status squares_cuda(const Context& context, const SquaresArgs& args);
Status norms_cuda(const Context& context, const NormsArgs& args);
Status scale_cuda(const Context& context, const ScaleArgs& args);
Status scale_backward_cuda(const Context& context, const ScaleBackwardArgs& args);

}  // namespace pylora::dora
