// lora: one adapter's low-rank product, forward and backward, added to a base product that the caller has made.
//
//   drop(x)[t, i] = x[t, i] * (kept(t, i) ? keep_scale : 0)     csrc/common/philox.h; drop(x) = x without dropout
//   v   = drop(x) a^T                                           shrink, [num_tokens, rank]
//   y  += scaling * v b^T                                       expand, [num_tokens, out_features]
//
// and, with g = scaling * dy b, the gradients
//
//   dx += drop(g a)
//   da  = g^T drop(x)
//   db  = scaling * dy^T v
//
// Numerics. Products are summed in f32 (f64 for f64), whatever the storage types; v, g and the converted factors stay
// in that type. y and dx are read, added to and rounded once (where the base product takes v b^T into its own sums, y
// is rounded once in all); da and db are rounded once. A row of v, y and dx
// depends on that row alone, and every sum has a fixed order: results have the same bits for any number of threads
// and any batch around a row. Sums over tokens (da, db) run in blocks of 64 tokens, in order. Instruction sets differ
// in the last bits. Dropping multiplies by 0: a dropped infinity or NaN is a NaN, as in torch.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/matrix.h"
#include "common/philox.h"
#include "common/status.h"

namespace pylora::lora {

struct Shape {
  int64_t num_tokens = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
  int64_t rank = 0;
  DType dtype = DType::f32;         // x, y, dx, dy
  DType factor_dtype = DType::f32;  // a, b, da, db
};

struct ForwardArgs {
  Shape shape;
  double scaling = 1;
  Dropout dropout;
  ConstMatrix x;              // [num_tokens, in_features]
  ConstMatrix a;              // [rank, in_features]
  ConstMatrix b;              // [out_features, rank]
  MutableMatrix y;            // [num_tokens, out_features], holds the base product
  void* v = nullptr;          // out: [num_tokens, rank], accumulator type, contiguous
  void* workspace = nullptr;  // forward_workspace_bytes(shape), aligned to 64
};

/// v alone, for a base product that adds v b^T itself (csrc/cpu/gemm.h).
struct ShrinkArgs {
  Shape shape;  // out_features is not read
  Dropout dropout;
  ConstMatrix x;              // [num_tokens, in_features]
  ConstMatrix a;              // [rank, in_features]
  void* v = nullptr;          // out: [num_tokens, rank], accumulator type, contiguous
  void* workspace = nullptr;  // shrink_workspace_bytes(args), aligned to 64
};

struct BackwardArgs {
  Shape shape;
  double scaling = 1;
  Dropout dropout;
  ConstMatrix dy;             // [num_tokens, out_features]
  ConstMatrix x;              // [num_tokens, in_features]; read for da alone
  ConstMatrix a, b;           // as in the forward
  const void* g = nullptr;    // [num_tokens, rank], accumulator type, contiguous, where the caller has it; dy and b are
                              // then read for db alone
  const void* v = nullptr;    // the forward's v; read for db alone
  MutableMatrix dx;           // holds the base's part, is added to; null: not wanted
  void* da = nullptr;         // [rank, in_features], contiguous; null: not wanted
  void* db = nullptr;         // [out_features, rank], contiguous; null: not wanted
  void* workspace = nullptr;  // backward_workspace_bytes(shape), aligned to 64
};

/// out = drop(x) on its own: where a caller's own code stands between dropout and the factors, and on devices without
/// fused kernels. It is its own backward.
struct DropoutArgs {
  int64_t num_tokens = 0;
  int64_t width = 0;
  DType dtype = DType::f32;
  Dropout dropout;
  ConstMatrix x;
  MutableMatrix out;
};

Status forward_cpu(const Context& context, const ForwardArgs& args);
Status shrink_cpu(const Context& context, const ShrinkArgs& args);
Status backward_cpu(const Context& context, const BackwardArgs& args);
Status dropout_cpu(const Context& context, const DropoutArgs& args);
/// Queued on context.stream; workspaces are forward_workspace_bytes_cuda and backward_workspace_bytes_cuda, of which the
/// first counter_bytes_cuda are zero before the call, and after it. Any strides of a and b; x, dy, y and dx have a column stride of 1. Numerics: csrc/cuda/segments.h.
Status forward_cuda(const Context& context, const ForwardArgs& args);
Status backward_cuda(const Context& context, const BackwardArgs& args);
Status dropout_cuda(const Context& context, const DropoutArgs& args);

}  // namespace pylora::lora
