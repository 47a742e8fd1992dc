// pylora::bidiagonalise_, gram_product and ritz_residuals: schemas, checks, registration. Without derivatives.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "binding/checks.h"
#include "binding/context.h"
#include "binding/status.h"
#include "lanczos/heuristics.h"
#include "lanczos/lanczos.h"

namespace pylora::lanczos {
namespace {

using at::Tensor;

class LanczosChecks : public binding::Checks {
 public:
  explicit LanczosChecks(const char* op) : Checks(op), op_(op) {}

  void wide_dtype(const char* name, const Tensor& t) const {
    TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, op_, ": ", name,
                     ": expected float32 or float64, got ", t.scalar_type());
  }

  void f64(const char* name, const Tensor& t) const {
    TORCH_CHECK_TYPE(t.scalar_type() == at::kDouble, op_, ": ", name, ": expected float64, got ", t.scalar_type());
  }

  void contiguous(const char* name, const Tensor& t) const {
    TORCH_CHECK_VALUE(t.is_contiguous(), op_, ": ", name, ": expected a contiguous tensor, got strides ", t.strides());
  }

 private:
  const char* op_;
};

void check_bidiagonalise(const Tensor& matrix, const Tensor& basis, const Tensor& left, const Tensor& diagonal,
                         const Tensor& above, int64_t locked, int64_t begin, int64_t end) {
  const char* op = "bidiagonalise_";
  const LanczosChecks check(op);
  check.shape("matrix", matrix, {-1, -1});
  check.wide_dtype("matrix", matrix);
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  TORCH_CHECK_VALUE(locked >= 0, op, ": locked: expected 0 or more, got ", locked);
  TORCH_CHECK_VALUE(0 <= begin && begin <= end, op, ": begin: expected 0 <= begin <= end, got ", begin, " and ", end);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("basis", basis), {"left", left}}) {
    check.same_dtype(name, t, "matrix", matrix);
    check.same_device(name, t, "matrix", matrix);
    check.contiguous(name, t);
  }
  check.shape("basis", basis, {-1, columns});
  check.shape("left", left, {rows});
  TORCH_CHECK_VALUE(basis.size(0) > locked + end, op, ": basis: expected more than locked + end rows, ", locked + end,
                    ", got shape ", basis.sizes());
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("diagonal", diagonal), {"above", above}}) {
    check.f64(name, t);
    TORCH_CHECK_VALUE(t.is_cpu(), op, ": ", name, ": expected a tensor on the CPU, got one on ", t.device());
    check.contiguous(name, t);
    check.shape(name, t, {-1});
    TORCH_CHECK_VALUE(t.size(0) >= end, op, ": ", name, ": expected at least `end` elements, ", end, ", got ",
                      t.size(0));
  }
}

void bidiagonalise(const Tensor& matrix, Tensor& basis, Tensor& left, Tensor& diagonal, Tensor& above, int64_t locked,
                   int64_t begin, int64_t end, int64_t seed) {
  check_bidiagonalise(matrix, basis, left, diagonal, above, locked, begin, end);
  TORCH_CHECK_VALUE(matrix.size(1) <= 1 || matrix.stride(1) == 1,
                    "bidiagonalise_: matrix: expected a column stride of 1, got strides ", matrix.strides());
  BidiagonaliseArgs args;
  args.rows = matrix.size(0);
  args.columns = matrix.size(1);
  args.dtype = binding::to_dtype(matrix.scalar_type());
  args.matrix = {matrix.const_data_ptr(), matrix.stride(0), 1};
  args.locked = locked;
  args.begin = begin;
  args.end = end;
  args.basis = basis.mutable_data_ptr();
  args.left = left.mutable_data_ptr();
  args.diagonal = diagonal.mutable_data_ptr<double>();
  args.above = above.mutable_data_ptr<double>();
  args.seed = static_cast<uint64_t>(seed);
  const Tensor workspace = at::empty({bidiagonalise_workspace_bytes(args)}, matrix.options().dtype(at::kByte));
  args.workspace = workspace.mutable_data_ptr();
  binding::throw_unless_ok(bidiagonalise_cpu(binding::cpu_context(), args));
}

Tensor gram_product(const Tensor& matrix, const Tensor& x) {
  const char* op = "gram_product";
  const LanczosChecks check(op);
  check.shape("matrix", matrix, {-1, -1});
  check.wide_dtype("matrix", matrix);
  TORCH_CHECK_VALUE(matrix.size(1) <= 1 || matrix.stride(1) == 1, op,
                    ": matrix: expected a column stride of 1, got strides ", matrix.strides());
  check.same_dtype("x", x, "matrix", matrix);
  check.same_device("x", x, "matrix", matrix);
  check.shape("x", x, {matrix.size(1), -1});
  GramArgs args;
  args.rows = matrix.size(0);
  args.columns = matrix.size(1);
  args.width = x.size(1);
  args.dtype = binding::to_dtype(matrix.scalar_type());
  args.matrix = {matrix.const_data_ptr(), matrix.stride(0), 1};
  args.x = {x.const_data_ptr(), x.stride(0), x.stride(1)};
  const Tensor out = at::empty({args.columns, args.width}, matrix.options());
  args.out = out.mutable_data_ptr();
  int64_t bytes = 0;
  binding::throw_unless_ok(gram_product_workspace_bytes(args, &bytes));
  const Tensor workspace = at::empty({bytes}, matrix.options().dtype(at::kByte));
  args.workspace = workspace.mutable_data_ptr();
  binding::throw_unless_ok(gram_product_cpu(binding::cpu_context(), args));
  return out;
}

Tensor gram_product_aten(const Tensor& matrix, const Tensor& x) { return at::mm(matrix.t(), at::mm(matrix, x)); }

// ---- the same in ATen calls, for other devices ----

double take_out(const Tensor& basis, int64_t first, int64_t last, Tensor& z) {
  const Tensor used = basis.narrow(0, first, last - first);
  z = at::addmv(z, used.t(), at::mv(used, z), 1, -1);
  return z.norm().item<double>();
}

void restart(const Tensor& basis, int64_t row, int64_t seed) {
  const Tensor start = at::empty({basis.size(1)}, at::device(at::kCPU).dtype(at::kDouble));
  start_vector(static_cast<uint64_t>(seed), row, basis.size(1), start.mutable_data_ptr<double>());
  Tensor z = start.to(basis.options());
  take_out(basis, 0, row, z);
  const double norm = take_out(basis, 0, row, z);
  basis.select(0, row).copy_(norm > 0 ? z.div(norm) : z);
}

void bidiagonalise_aten(const Tensor& matrix, Tensor& basis, Tensor& left, Tensor& diagonal, Tensor& above,
                        int64_t locked, int64_t begin, int64_t end, int64_t seed) {
  check_bidiagonalise(matrix, basis, left, diagonal, above, locked, begin, end);
  double *alphas = diagonal.mutable_data_ptr<double>(), *betas = above.mutable_data_ptr<double>();
  if (begin == 0 && end > 0) restart(basis, locked, seed);
  for (int64_t j = begin; j < end; ++j) {
    const int64_t row = locked + j;
    Tensor product = at::mv(matrix, basis.select(0, row));
    if (j > 0 && alphas[j - 1] > 0) product = product.sub(left.mul(betas[j - 1] / alphas[j - 1]));
    left.copy_(product);
    const double alpha = left.norm().item<double>();
    Tensor z = at::mv(matrix.t(), left);
    const double before = take_out(basis, row, row + 1, z), once = take_out(basis, 0, row + 1, z);
    const bool is_again = once < kKeptShare * before;
    const double twice = is_again ? take_out(basis, 0, row + 1, z) : once;
    const double beta = alpha > 0 ? twice / alpha : 0;
    if (!std::isfinite(alpha) || !std::isfinite(beta)) {
      std::fill(alphas + j, alphas + end, NAN);
      std::fill(betas + j, betas + end, NAN);
      return;
    }
    const double largest = std::max(alpha, j > 0 ? *std::max_element(alphas, alphas + j) : 0.0);
    const double negligible = roundoff(binding::to_dtype(matrix.scalar_type())) * largest;
    const bool spanned = alpha <= negligible || beta <= negligible || (is_again && twice < 0.5 * once);
    alphas[j] = alpha <= negligible ? 0 : alpha;
    betas[j] = spanned ? 0 : beta;
    if (spanned) {
      restart(basis, row + 1, seed);
    } else {
      basis.select(0, row + 1).copy_(z.div(alpha * beta));
    }
  }
}

std::tuple<Tensor, Tensor> ritz_residuals(const Tensor& diagonal, const Tensor& above, int64_t rank) {
  const char* op = "ritz_residuals";
  const LanczosChecks check(op);
  check.shape("diagonal", diagonal, {-1});
  const int64_t steps = diagonal.size(0);
  check.shape("above", above, {steps});
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("diagonal", diagonal), {"above", above}}) {
    check.f64(name, t);
    check.contiguous(name, t);
  }
  TORCH_CHECK_VALUE(0 <= rank && rank <= steps, op, ": rank: expected 0 to ", steps, ", the steps, got ", rank);
  const Tensor values = at::empty({rank}, diagonal.options()), residuals = at::empty({rank}, diagonal.options());
  const Tensor workspace = at::empty({3 * steps}, diagonal.options());
  RitzArgs args;
  args.steps = steps;
  args.diagonal = diagonal.const_data_ptr<double>();
  args.above = above.const_data_ptr<double>();
  args.rank = rank;
  args.values = values.mutable_data_ptr<double>();
  args.residuals = residuals.mutable_data_ptr<double>();
  args.workspace = workspace.mutable_data_ptr<double>();
  binding::throw_unless_ok(ritz_residuals_cpu(args));
  return {values, residuals};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "bidiagonalise_(Tensor matrix, Tensor(a!) basis, Tensor(b!) left, Tensor(c!) diagonal, Tensor(d!) above, "
      "int locked, int begin, int end, int seed) -> ()",
      tags);
  m.def("gram_product(Tensor matrix, Tensor x) -> Tensor", tags);
  m.def("ritz_residuals(Tensor diagonal, Tensor above, int rank) -> (Tensor values, Tensor residuals)", tags);
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) {
  m.impl("bidiagonalise_", &bidiagonalise);
  m.impl("gram_product", &gram_product);
  m.impl("ritz_residuals", &ritz_residuals);
}

TORCH_LIBRARY_IMPL(pylora, CompositeExplicitAutograd, m) {
  m.impl("bidiagonalise_", &bidiagonalise_aten);
  m.impl("gram_product", &gram_product_aten);
}

}  // namespace pylora::lanczos
