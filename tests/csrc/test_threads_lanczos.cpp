// The Lanczos launchers on several threads and from several callers: the bits of one thread.
#include "lanczos/lanczos.h"
#include "threads.h"

using namespace pylora;
using test::AlignedBuffer;
using test::append;
using test::Bytes;
using test::random_elements;

namespace {

Bytes zeros(int64_t elements, DType dtype) { return Bytes(static_cast<size_t>(elements * dtype_bytes(dtype))); }

/// In two calls, beside locked rows that are kept.
void check_bidiagonalise(DType dtype, int64_t rows, int64_t columns) {
  const int64_t steps = 9;
  const Bytes w = random_elements(dtype, rows * columns, 1);
  test::check_threads("bidiagonalise", [&](const Context& context) {
    Bytes basis = zeros((steps + 1) * columns, dtype), left = zeros(rows, dtype);
    Bytes diagonal = zeros(steps, DType::f64), above = zeros(steps, DType::f64);
    lanczos::BidiagonaliseArgs args;
    args.rows = rows;
    args.columns = columns;
    args.dtype = dtype;
    args.matrix = {w.data(), columns, 1};
    args.basis = basis.data();
    args.left = left.data();
    args.diagonal = reinterpret_cast<double*>(diagonal.data());
    args.above = reinterpret_cast<double*>(above.data());
    args.end = steps;
    const AlignedBuffer workspace(lanczos::bidiagonalise_workspace_bytes(args));
    args.workspace = workspace.data.get();
    args.end = 4;
    CHECK(lanczos::bidiagonalise_cpu(context, args).is_ok(), "first steps");
    args.begin = 4;
    args.end = steps;
    CHECK(lanczos::bidiagonalise_cpu(context, args).is_ok(), "further steps");
    append(&basis, left);
    append(&basis, diagonal);
    append(&basis, above);
    return basis;
  });
}

void check_gram(DType dtype, int64_t rows, int64_t columns, int64_t width) {
  const Bytes w = random_elements(dtype, rows * columns, 2), x = random_elements(dtype, columns * width, 3);
  test::check_threads("gram_product", [&](const Context& context) {
    Bytes out = zeros(columns * width, dtype);
    lanczos::GramArgs args;
    args.rows = rows;
    args.columns = columns;
    args.width = width;
    args.dtype = dtype;
    args.matrix = {w.data(), columns, 1};
    args.x = {x.data(), width, 1};
    args.out = out.data();
    int64_t bytes = 0;
    CHECK(lanczos::gram_product_workspace_bytes(args, &bytes).is_ok(), "workspace");
    const AlignedBuffer workspace(bytes);
    args.workspace = workspace.data.get();
    CHECK(lanczos::gram_product_cpu(context, args).is_ok(), "gram_product");
    return out;
  });
}

}  // namespace

int main() {
  test::with_each_isa([] {
    for (DType dtype : {DType::f32, DType::f64}) {
      check_bidiagonalise(dtype, 301, 67);
      check_bidiagonalise(dtype, 70, 515);
      check_gram(dtype, 301, 67, 16);
      check_gram(dtype, 70, 515, 5);
    }
  });
  return test::failures() == 0 ? 0 : 1;
}
