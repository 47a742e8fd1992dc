// gemm_cpu without torch: both layouts of the weight, few and many rows, ends in every direction, each instruction set.
#include "cpu/gemm.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "inputs.h"

using namespace pylora;
using test::from_bf16;
using test::normal;
using test::to_bf16;

namespace {

/// Runs as three threads would, in one: ranges in reverse, so that a range that reads another's results shows.
Context three_ranges() {
  Context context;
  context.run_ranges = [](int64_t count, int64_t, RangeBody call, void* body) {
    const int64_t third = (count + 2) / 3;
    for (int64_t begin = third * 2; begin >= 0; begin -= third)
      if (begin < count) call(body, begin, begin + third < count ? begin + third : count);
  };
  return context;
}

/// v, b and the term that points at them; rank 0: none.
struct LowRank {
  std::vector<float> v, b;
  std::vector<uint16_t> b16;
  LowRankTerm term;

  LowRank(int64_t rows, int64_t columns, int64_t rank, DType dtype)
      : v(normal(rows * rank, 4)), b(normal(columns * rank, 5)) {
    for (float& value : b) {
      b16.push_back(to_bf16(value));
      if (dtype == DType::bf16) value = from_bf16(b16.back());
    }
    const void* data = dtype == DType::bf16 ? static_cast<const void*>(b16.data()) : b.data();
    term = {rank, 0.5f, v.data(), {data, rank, 1}, dtype};
  }
};

void check_product(int64_t rows, int64_t columns, int64_t depth, DType dtype, bool transposed, int64_t rank = 0,
                   DType factor_dtype = DType::f32, bool scaled = false) {
  std::vector<float> x = normal(rows * depth, 1), w = normal(columns * depth, 2), bias = normal(columns, 3);
  const std::vector<float> factor = normal(columns, 6);
  std::vector<float> y(static_cast<size_t>(rows * columns));
  std::vector<uint16_t> x16, w16, bias16, y16(y.size());
  for (auto [from, to] : {std::pair{&x, &x16}, {&w, &w16}, {&bias, &bias16}}) {
    for (float& value : *from) {
      to->push_back(to_bf16(value));
      if (dtype == DType::bf16) value = from_bf16(to->back());
    }
  }
  const bool narrow = dtype == DType::bf16;
  GemmArgs args;
  args.rows = rows;
  args.columns = columns;
  args.depth = depth;
  args.dtype = dtype;
  args.x = {narrow ? static_cast<const void*>(x16.data()) : x.data(), depth, 1};
  args.w = {narrow ? static_cast<const void*>(w16.data()) : w.data(), transposed ? 1 : depth, transposed ? columns : 1};
  const LowRank low_rank(rows, columns, rank, factor_dtype);
  args.low_rank = low_rank.term;
  args.bias = narrow ? static_cast<const void*>(bias16.data()) : bias.data();
  if (scaled) args.factor = factor.data();
  args.y = {narrow ? static_cast<void*>(y16.data()) : y.data(), columns, 1};
  const test::AlignedBuffer workspace(gemm_workspace_bytes(args));
  args.workspace = workspace.data.get();

  CHECK(gemm_cpu(Context{}, args).is_ok(), "%ld x %ld x %ld", long(rows), long(columns), long(depth));
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t o = 0; o < columns; ++o) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = double(x[t * depth + k]) * w[transposed ? k * columns + o : o * depth + k];
        sum += term;
        size += std::fabs(term);
      }
      for (int64_t r = 0; r < rank; ++r) {
        const double term = 0.5 * low_rank.v[t * rank + r] * low_rank.b[o * rank + r];
        sum += term;
        size += std::fabs(term);
      }
      if (scaled) sum *= factor[o], size *= std::fabs(factor[o]);
      sum += bias[o];
      size += std::fabs(bias[o]);
      const double got = narrow ? from_bf16(y16[t * columns + o]) : y[t * columns + o];
      const double limit = 1e-6 * size + (narrow ? std::fabs(sum) / 256 : 0);
      CHECK(std::fabs(got - sum) <= limit, "%ld x %ld x %ld rank %ld at %ld, %ld: %g, expected %g", long(rows),
            long(columns), long(depth), long(rank), long(t), long(o), got, sum);
    }
  }
  const std::vector<float> y_once = y;
  const std::vector<uint16_t> y16_once = y16;
  CHECK(gemm_cpu(three_ranges(), args).is_ok(), "ranges");
  CHECK(y == y_once && y16 == y16_once, "same bits for any sharing of the columns");
}

}  // namespace

int main() {
  for (Isa isa : kAllIsas) {
    if (!isa_built(isa) || !isa_supported(isa)) continue;
    CHECK(set_isa(isa_name(isa)).is_ok(), "%s", isa_name(isa));
    for (DType dtype : {DType::f32, DType::bf16})
      for (bool transposed : {false, true})
        for (int64_t rows : {1, 2, 3, 4, 5, 8, 29, 197})
          for (int64_t columns : {1, 31, 70})
            for (int64_t depth : {0, 1, 40, 300})
              check_product(rows, columns, depth, dtype, transposed);
    for (DType dtype : {DType::f32, DType::bf16})
      for (DType factor_dtype : {DType::f32, dtype})
        for (int64_t rows : {1, 2, 3, 5, 200})
          for (int64_t rank : {1, 16, 23, 300})
            for (int64_t depth : {0, 40, 641, 2100})
              check_product(rows, 45, depth, dtype, false, rank, factor_dtype);
    check_product(4, 45, 40, DType::bf16, true, 7, DType::bf16);
    for (DType dtype : {DType::f32, DType::bf16})
      for (bool transposed : {false, true})
        for (int64_t rows : {1, 3, 5, 200})
          for (int64_t columns : {1, 45, 300})
            check_product(rows, columns, 70, dtype, transposed, transposed ? 0 : 9, DType::f32, true);
    for (DType dtype : {DType::f32, DType::bf16})
      for (int64_t depth : {600, 640, 1153})
        check_product(7, 9, depth, dtype, false, 1500);  // a rank of several blocks
    check_product(2, 300, 4100, DType::f32, false);
    check_product(1, 300, 4100, DType::bf16, false);
  }
  GemmArgs wide;
  wide.rows = 1;
  wide.dtype = DType::f64;
  GemmArgs narrow;
  narrow.rows = 1;
  narrow.dtype = DType::bf16;
  CHECK(!gemm_takes_low_rank(narrow, 16, DType::f16) && !gemm_takes_low_rank(narrow, 513, DType::f32), "limits");
  narrow.low_rank.rank = 16;
  narrow.low_rank.dtype = DType::f16;
  CHECK(!gemm_cpu(Context{}, narrow).is_ok(), "b of a third dtype");
  CHECK(!gemm_is_better(wide) && !gemm_cpu(Context{}, wide).is_ok(), "f64 is torch's");
  return test::failures() == 0 ? 0 : 1;
}
