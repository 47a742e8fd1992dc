// The kernels of one instruction set. "C" below is the accumulator of W's or the activations' dtype: f32, or f64 for
// f64. Each works on a range, and the launcher shares out the ranges.
#pragma once

#include "dora/dora.h"
#include "dora/heuristics.h"

namespace pylora::dora {

/// What the norms are computed from once A and B are converted.
struct Product {
  int64_t rank = 0;
  const void* panels = nullptr;        // C [num_panels][rank][kPanelColumns]
  const void* coefficients = nullptr;  // C [out_features][rank]
};

struct NormKernels {
  /// out[i] = p[i * stride] in f64.
  using Widen = void (*)(const void* p, int64_t stride, int64_t count, double* out);
  /// squares[o] = |w[o, :]|^2 for rows [begin, end).
  using Squares = void (*)(int64_t begin, int64_t end, ConstMatrix w, int64_t width, double* squares);
  /// Panels [begin, end) of A.
  using Panels = void (*)(int64_t begin, int64_t end, ConstMatrix a, int64_t rank, int64_t width, void* panels);
  /// Rows [begin, end) of C out[rows, rank] = scaling * b.
  using Coefficients = void (*)(int64_t begin, int64_t end, ConstMatrix b, int64_t rank, double scaling, void* out);
  /// For rows [begin, end): sums[o] = |w[o, :] + coefficients[o, :] A|^2 and squares[o - begin] = |w[o, :]|^2.
  using Norms = void (*)(int64_t begin, int64_t end, ConstMatrix w, int64_t width, const Product& product, double* sums,
                         double* squares);
  /// Rows [begin, end) of C gram[rank][gram_stride(rank)] = A A^T.
  using Gram = void (*)(int64_t begin, int64_t end, const void* panels, int64_t num_panels, int64_t rank, void* gram);
  /// sums[o] = squares[o] + 2 coefficients[o, :] . cross[:, o] + |coefficients[o, :] A|^2 for rows [begin, end).
  using Assemble = void (*)(int64_t begin, int64_t end, ConstMatrix cross, const void* gram, const Product& product,
                            const double* squares, double* sums);
  // Indexed by DType; [dtype of a factor][accumulator is f64] where there are two.
  Widen widen[kNumDTypes];
  Squares squares[kNumDTypes];
  Panels panels[kNumDTypes][2];
  Coefficients coefficients[kNumDTypes][2];
  Norms norms[kNumDTypes];
  Gram gram[2];
  Assemble assemble[2];
};

struct ScaleKernels {
  /// C factor[i] = magnitude[i] / norm[i] and C norm[i], both of entry first + i, for i in [0, count).
  using Factor = void (*)(const void* magnitude, const double* norms, int64_t first, int64_t count, void* factor,
                          void* norm);
  /// Tokens [begin, end) of y.
  using Scale = void (*)(int64_t begin, int64_t end, const ScaleArgs& args, Factor factor);
  /// Columns [begin, end) of dz and dmagnitude.
  using ScaleBackward = void (*)(int64_t begin, int64_t end, const ScaleBackwardArgs& args, Factor factor);

  // Indexed by DType, factor by [magnitude's dtype][accumulator is f64].
  Factor factor[kNumDTypes][2];
  Scale scale[kNumDTypes];
  ScaleBackward scale_backward[kNumDTypes];
};

/// Columns that threads share out in scale_backward.
constexpr int64_t kScaleColumns = 256;

}  // namespace pylora::dora
