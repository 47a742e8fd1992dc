// Golub-Kahan-Lanczos bidiagonalisation: W V = U B with orthonormal V and an upper bidiagonal B, a column a step.
//
// Numerics. Products are summed in W's type, in vector lanes along a row and over rows in chunks whose bounds depend on
// the shape alone, so that results have the same bits for any number of threads (not for any instruction set).
// Squares of norms are summed in f64. V is orthogonalised against all that came before, a second time where that
// takes much away; U is not, and not kept.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/matrix.h"
#include "common/status.h"

namespace pylora::lanczos {

struct BidiagonaliseArgs {
  int64_t rows = 0, columns = 0;
  DType dtype = DType::f32;  // of the matrix, basis and left: f32 or f64
  ConstMatrix matrix;        // W [rows, columns], column stride 1
  /// [locked + steps + 1, columns], contiguous. The first `locked` rows are orthonormal and V stays orthogonal to them;
  /// row locked + j is v_j. Steps [begin, end) write rows locked + begin + 1 .. locked + end, and begin 0 also v_0.
  void* basis = nullptr;
  int64_t locked = 0;
  int64_t begin = 0, end = 0;
  void* left = nullptr;        // [rows], α u of the last step: kept between calls
  double* diagonal = nullptr;  // α_j = B[j, j] for j in [begin, end); those before are read
  double* above = nullptr;     // β_j = B[j, j + 1]; 0 where v_{j + 1} starts anew; NaN from where a value is not finite
  uint64_t seed = 0;           // of v_0, and of the vectors that go on where V spans an invariant space
  void* workspace = nullptr;   // bidiagonalise_workspace_bytes(args), aligned to 64
};

/// The random vector, not yet orthogonal to anything, that row `row` of a basis starts from: uniform in (-1, 1).
void start_vector(uint64_t seed, int64_t row, int64_t columns, double* out);

int64_t bidiagonalise_workspace_bytes(const BidiagonaliseArgs& args);
Status bidiagonalise_cpu(const Context& context, const BidiagonaliseArgs& args);

struct GramArgs {
  int64_t rows = 0, columns = 0, width = 0;
  DType dtype = DType::f32;   // of all: f32 or f64
  ConstMatrix matrix;         // W [rows, columns], column stride 1
  ConstMatrix x;              // [columns, width]
  void* out = nullptr;        // Wᵀ(W X) [columns, width], contiguous
  void* workspace = nullptr;  // gram_product_workspace_bytes, aligned to 64
};

/// Of the instruction set in use, whose panels it holds.
Status gram_product_workspace_bytes(const GramArgs& args, int64_t* bytes);
/// Reads W once. Summed like the bidiagonalisation's products.
Status gram_product_cpu(const Context& context, const GramArgs& args);

struct RitzArgs {
  int64_t steps = 0;  // of B [steps, steps + 1]: diagonal and above as above
  const double* diagonal = nullptr;
  const double* above = nullptr;
  int64_t rank = 0;             // at most steps
  double* values = nullptr;     // [rank]: the largest singular values of B[:, :steps], descending
  double* residuals = nullptr;  // [rank]: |Wᵀu - σv| of their triplets, which is |β_last| times u's last element
  double* workspace = nullptr;  // 3 * steps
};

/// In f64, by implicit QL on B Bᵀ of which only the last row of the vectors is formed: O(steps²). Where that does not
/// converge, or a value is not finite, all results are NaN.
Status ritz_residuals_cpu(const RitzArgs& args);

}  // namespace pylora::lanczos
