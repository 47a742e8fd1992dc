// The dora launchers on the CPU: lay out the workspace, share out rows of W, tokens or columns, and compute again the
// rows that have cancelled.
#include <cmath>

#include "cpu/kernel_table.h"
#include "dora/kernels.h"

PYLORA_KERNEL_TABLE(dora::NormKernels, dora_norm_kernels)
PYLORA_KERNEL_TABLE(dora::ScaleKernels, dora_scale_kernels)

namespace pylora::dora {
namespace {

int index(DType dtype) { return static_cast<int>(dtype); }
bool is_f64(DType dtype) { return accumulator_dtype(dtype) == DType::f64; }

Status find_kernels(const NormKernels** kernels) {
  Isa isa;
  const Status status = current_isa(&isa);
  *kernels = &dora_norm_kernels_table(isa);
  return status;
}

Status find_kernels(const ScaleKernels** kernels) {
  Isa isa;
  const Status status = current_isa(&isa);
  *kernels = &dora_scale_kernels_table(isa);
  return status;
}

Status check(const NormsArgs& args) {
  if (args.out_features < 0 || args.in_features < 0) return invalid_argument("dora: negative size");
  if (args.rank < 1) return invalid_argument("dora: rank: expected at least 1");
  return {};
}

char* panels_of(const NormsArgs& args) { return static_cast<char*>(args.workspace); }
char* coefficients_of(const NormsArgs& args) { return panels_of(args) + panels_bytes(args); }
char* gram_of(const NormsArgs& args) { return coefficients_of(args) + coefficients_bytes(args); }

/// A and scaling * B, converted into the workspace.
Product convert(const Context& context, const NormKernels& kernels, const NormsArgs& args) {
  const bool f64 = is_f64(args.dtype);
  parallel_for(
      context, num_panels(args.in_features), grain(args.rank * kPanelColumns), [&](int64_t begin, int64_t end) {
        kernels.panels[index(args.factor_dtype)][f64](begin, end, args.a, args.rank, args.in_features, panels_of(args));
      });
  parallel_for(context, args.out_features, grain(args.rank), [&](int64_t begin, int64_t end) {
    kernels.coefficients[index(args.factor_dtype)][f64](begin, end, args.b, args.rank, args.scaling,
                                                        coefficients_of(args));
  });
  return {args.rank, panels_of(args), coefficients_of(args)};
}

const void* element(ConstMatrix m, DType dtype, int64_t row, int64_t column) {
  return static_cast<const char*>(m.data) + (row * m.row_stride + column * m.column_stride) * dtype_bytes(dtype);
}

/// |W[row, :] + scaling * B[row, :] A|^2 in f64, each element from the factors as they are stored.
double exact_square(const NormKernels& kernels, const NormsArgs& args, int64_t row) {
  double total = 0;
  for (int64_t k = 0; k < args.in_features; k += kPanelColumns) {
    const int64_t left = args.in_features - k, columns = left < kPanelColumns ? left : kPanelColumns;
    double sums[kPanelColumns], factor[kPanelColumns];
    kernels.widen[index(args.dtype)](element(args.weight, args.dtype, row, k), args.weight.column_stride, columns,
                                     sums);
    for (int64_t r = 0; r < args.rank; ++r) {
      double b;
      kernels.widen[index(args.factor_dtype)](element(args.b, args.factor_dtype, row, r), 1, 1, &b);
      kernels.widen[index(args.factor_dtype)](element(args.a, args.factor_dtype, r, k), args.a.column_stride, columns,
                                              factor);
      for (int64_t i = 0; i < columns; ++i)
        sums[i] += args.scaling * b * factor[i];
    }
    for (int64_t i = 0; i < columns; ++i)
      total += sums[i] * sums[i];
  }
  return total;
}

/// norms = sqrt(norms) for rows [begin, end), after those of which too little is left are computed again; squares are
/// the rows' own, from `begin` on. "Not above" rather than "below": sums that overflowed are computed again too.
void finish(const NormKernels& kernels, const NormsArgs& args, int64_t begin, int64_t end, const double* squares) {
  for (int64_t row = begin; row < end; ++row) {
    const double square =
        args.norms[row] > kCancelled * squares[row - begin] ? args.norms[row] : exact_square(kernels, args, row);
    args.norms[row] = std::sqrt(square);
  }
}

}  // namespace

Status squares_cpu(const Context& context, const SquaresArgs& args) {
  const NormKernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;
  parallel_for(context, args.out_features, grain(args.in_features), [&](int64_t begin, int64_t end) {
    kernels->squares[index(args.dtype)](begin, end, args.weight, args.in_features, args.squares);
  });
  return {};
}

Status norms_cpu(const Context& context, const NormsArgs& args) {
  if (const Status status = check(args); !status.is_ok()) return status;
  const NormKernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;
  const Product product = convert(context, *kernels, args);
  parallel_for(context, args.out_features, grain(args.in_features * args.rank), [&](int64_t begin, int64_t end) {
    constexpr int64_t kRows = 96;
    double squares[kRows];
    for (int64_t row = begin; row < end; row += kRows) {
      const int64_t last = row + kRows < end ? row + kRows : end;
      kernels->norms[index(args.dtype)](row, last, args.weight, args.in_features, product, args.norms, squares);
      finish(*kernels, args, row, last, squares);
    }
  });
  return {};
}

Status norms_from_cross_cpu(const Context& context, const CrossArgs& cross_args) {
  const NormsArgs& args = cross_args.norms;
  if (const Status status = check(args); !status.is_ok()) return status;
  const NormKernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;
  const bool f64 = is_f64(args.dtype);
  const Product product = convert(context, *kernels, args);
  void* gram = gram_of(args);
  parallel_for(context, args.rank, grain(args.rank * args.in_features), [&](int64_t begin, int64_t end) {
    kernels->gram[f64](begin, end, product.panels, num_panels(args.in_features), args.rank, gram);
  });
  parallel_for(context, args.out_features, grain(args.rank * args.rank), [&](int64_t begin, int64_t end) {
    kernels->assemble[f64](begin, end, cross_args.cross, gram, product, cross_args.squares, args.norms);
    finish(*kernels, args, begin, end, cross_args.squares + begin);
  });
  return {};
}

Status factor_cpu(const FactorArgs& args) {
  const ScaleKernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;
  const bool f64 = is_f64(args.dtype);
  constexpr int64_t kColumns = 512;
  double norm[kColumns];  // accumulators of either size, not needed here
  for (int64_t c = 0; c < args.out_features; c += kColumns) {
    const int64_t left = args.out_features - c;
    void* factor = static_cast<char*>(args.factor) + c * dtype_bytes(accumulator_dtype(args.dtype));
    kernels->factor[index(args.magnitude_dtype)][f64](args.magnitude, args.norms, c, left < kColumns ? left : kColumns,
                                                      factor, norm);
  }
  return {};
}

Status scale_cpu(const Context& context, const ScaleArgs& args) {
  const ScaleKernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;
  const auto factor = kernels->factor[index(args.magnitude_dtype)][is_f64(args.dtype)];
  parallel_for(context, args.num_tokens, grain(args.out_features),
               [&](int64_t begin, int64_t end) { kernels->scale[index(args.dtype)](begin, end, args, factor); });
  return {};
}

Status scale_backward_cpu(const Context& context, const ScaleBackwardArgs& args) {
  const ScaleKernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;
  const auto factor = kernels->factor[index(args.magnitude_dtype)][is_f64(args.dtype)];
  const int64_t blocks = (args.out_features + kScaleColumns - 1) / kScaleColumns;
  parallel_for(context, blocks, grain(kScaleColumns * args.num_tokens), [&](int64_t begin, int64_t end) {
    const int64_t last = end * kScaleColumns < args.out_features ? end * kScaleColumns : args.out_features;
    kernels->scale_backward[index(args.dtype)](begin * kScaleColumns, last, args, factor);
  });
  return {};
}

}  // namespace pylora::dora
