// The Lanczos launchers as an engine without torch calls them: W V = U B, on every instruction set.
#include "lanczos/lanczos.h"

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "inputs.h"

using namespace pylora;

namespace {

void check_shape(int64_t rows, int64_t columns, int64_t steps) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> w(static_cast<size_t>(rows * columns));
  for (float& value : w)
    value = normal(generator);
  std::vector<float> basis(static_cast<size_t>((steps + 1) * columns), NAN), left(static_cast<size_t>(rows), NAN);
  std::vector<double> diagonal(static_cast<size_t>(steps), NAN), above(diagonal);
  lanczos::BidiagonaliseArgs args;
  args.rows = rows;
  args.columns = columns;
  args.matrix = {w.data(), columns, 1};
  args.basis = basis.data();
  args.left = left.data();
  args.diagonal = diagonal.data();
  args.above = above.data();
  args.end = steps;
  std::vector<double> workspace(static_cast<size_t>(lanczos::bidiagonalise_workspace_bytes(args) / 8 + 1), NAN);
  args.workspace = workspace.data();
  CHECK(lanczos::bidiagonalise_cpu(Context{}, args).is_ok(), "%ld x %ld", long(rows), long(columns));

  const auto v = [&](int64_t j, int64_t i) { return static_cast<double>(basis[static_cast<size_t>(j * columns + i)]); };
  double worst = 0;
  for (int64_t j = 0; j < steps; ++j) {
    for (int64_t k = 0; k <= j; ++k) {
      double dot = 0;
      for (int64_t i = 0; i < columns; ++i)
        dot += v(j, i) * v(k, i);
      worst = std::fmax(worst, std::fabs(dot - (j == k)));
    }
    // W v_j = β_{j-1} u_{j-1} + α_j u_j with orthonormal u
    double squares = 0;
    for (int64_t r = 0; r < rows; ++r) {
      double product = 0;
      for (int64_t i = 0; i < columns; ++i)
        product += w[static_cast<size_t>(r * columns + i)] * v(j, i);
      squares += product * product;
    }
    const double alpha = diagonal[static_cast<size_t>(j)], beta = j > 0 ? above[static_cast<size_t>(j - 1)] : 0;
    worst = std::fmax(worst, std::fabs(squares / (alpha * alpha + beta * beta) - 1));
  }
  CHECK(worst <= 2e-5, "%ld x %ld, %ld steps: error %g", long(rows), long(columns), long(steps), worst);
}

/// Wᵀ(W X) element by element, each held to the sum of its terms' magnitudes.
void check_gram(int64_t rows, int64_t columns, int64_t width) {
  const std::vector<float> w = test::normal(rows * columns, 2), x = test::normal(columns * width, 3);
  std::vector<float> out(static_cast<size_t>(columns * width), NAN);
  lanczos::GramArgs args;
  args.rows = rows;
  args.columns = columns;
  args.width = width;
  args.matrix = {w.data(), columns, 1};
  args.x = {x.data(), width, 1};
  args.out = out.data();
  int64_t bytes = 0;
  CHECK(lanczos::gram_product_workspace_bytes(args, &bytes).is_ok(), "workspace");
  const test::AlignedBuffer workspace(bytes);
  args.workspace = workspace.data.get();
  CHECK(lanczos::gram_product_cpu(Context{}, args).is_ok(), "%ld x %ld", long(rows), long(columns));
  for (int64_t j = 0; j < width; ++j) {
    std::vector<double> sums(static_cast<size_t>(columns)), sizes(sums);
    for (int64_t r = 0; r < rows; ++r) {
      double product = 0, size = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const double term = static_cast<double>(w[static_cast<size_t>(r * columns + k)]) *
                            static_cast<double>(x[static_cast<size_t>(k * width + j)]);
        product += term;
        size += std::fabs(term);
      }
      for (int64_t k = 0; k < columns; ++k) {
        const double factor = static_cast<double>(w[static_cast<size_t>(r * columns + k)]);
        sums[static_cast<size_t>(k)] += factor * product;
        sizes[static_cast<size_t>(k)] += std::fabs(factor) * size;
      }
    }
    const double eps = std::ldexp(std::sqrt(static_cast<double>(rows + columns)) + 2, -24);
    for (int64_t k = 0; k < columns; ++k) {
      const double got = static_cast<double>(out[static_cast<size_t>(k * width + j)]);
      CHECK(std::fabs(got - sums[static_cast<size_t>(k)]) <= eps * sizes[static_cast<size_t>(k)],
            "%ld x %ld: element %ld, %ld: %g", long(rows), long(columns), long(k), long(j), got);
    }
  }
}

void check_ritz() {
  // [[2, 1], [0, 1]]: σ² = 3 ± √5
  const double diagonal[] = {2, 1}, above[] = {1, 0.5};
  double values[2], residuals[2], workspace[6];
  const lanczos::RitzArgs args{2, diagonal, above, 2, values, residuals, workspace};
  CHECK(lanczos::ritz_residuals_cpu(args).is_ok(), "ritz");
  CHECK(std::fabs(values[0] - std::sqrt(3 + std::sqrt(5.0))) < 1e-14, "%g", values[0]);
  CHECK(std::fabs(values[1] - std::sqrt(3 - std::sqrt(5.0))) < 1e-14, "%g", values[1]);
  CHECK(std::fabs(std::hypot(residuals[0], residuals[1]) - 0.5) < 1e-14, "the last row is a unit vector");
}

}  // namespace

int main() {
  for (Isa isa : kAllIsas) {
    if (!isa_built(isa)) continue;
    if (!isa_supported(isa)) {
      std::printf("skipped: this CPU has no %s\n", isa_name(isa));
      continue;
    }
    CHECK(set_isa(isa_name(isa)).is_ok(), "%s", isa_name(isa));
    check_shape(40, 30, 12);
    check_shape(301, 67, 20);
    check_shape(9, 200, 5);
    check_shape(1, 1, 1);
    check_gram(40, 30, 16);
    check_gram(301, 67, 5);
    check_gram(9, 200, 33);
    check_gram(1, 1, 1);
    check_gram(0, 7, 3);
  }
  check_ritz();
  lanczos::BidiagonaliseArgs narrow;
  narrow.dtype = DType::bf16;
  CHECK(lanczos::bidiagonalise_cpu(Context{}, narrow).code == Status::Code::unsupported, "bf16 is refused");
  double none = 0;
  CHECK(!lanczos::ritz_residuals_cpu({0, &none, &none, 1, &none, &none, &none}).is_ok(), "rank above steps is refused");
  return test::failures() == 0 ? 0 : 1;
}
