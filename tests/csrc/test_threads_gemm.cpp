// gemm_cpu on several threads and from several callers: the bits of one thread, in both layouts of the weight.
#include "cpu/gemm.h"
#include "threads.h"

using namespace pylora;

namespace {

void check_product(int64_t rows, DType dtype, bool transposed, int64_t rank) {
  const int64_t columns = 170, depth = 300;
  const auto x = test::random_elements(dtype, rows * depth, 1), w = test::random_elements(dtype, columns * depth, 2),
             bias = test::random_elements(dtype, columns, 3), b = test::random_elements(dtype, columns * rank, 4);
  const auto v = test::normal(rows * rank, 5);
  test::check_threads("gemm", [&](const Context& context) {
    test::Bytes y(static_cast<size_t>(rows * columns * dtype_bytes(dtype)));
    GemmArgs args;
    args.rows = rows;
    args.columns = columns;
    args.depth = depth;
    args.dtype = dtype;
    args.x = {x.data(), depth, 1};
    args.w = {w.data(), transposed ? 1 : depth, transposed ? columns : 1};
    args.low_rank = {rank, 0.7f, v.data(), {b.data(), rank, 1}, dtype};
    args.bias = bias.data();
    args.y = {y.data(), columns, 1};
    const test::AlignedBuffer workspace(gemm_workspace_bytes(args));
    args.workspace = workspace.data.get();
    CHECK(gemm_cpu(context, args).is_ok(), "gemm");
    return y;
  });
}

}  // namespace

int main() {
  test::with_each_isa([] {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (bool transposed : {false, true})
        for (int64_t rows : {1, 3, 29, 197})
          for (int64_t rank : {0, 9})
            check_product(rows, dtype, transposed, rank);
  });
  return test::failures() == 0 ? 0 : 1;
}
