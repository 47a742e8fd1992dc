// The gemm launcher: which products it takes, its workspace, and sharing out columns.
#include "cpu/gemm.h"

#include "common/sizes.h"
#include "cpu/gemm_kernels.h"
#include "cpu/kernel_table.h"

PYLORA_KERNEL_TABLE(GemmKernels, gemm_kernels)
PYLORA_KERNEL_TABLE(GemmDotKernels, gemm_dot_kernels)

namespace pylora {
namespace {

/// Most rows of an f32 product. At 256 MKL is as fast, at 512 up to 10 % faster.
constexpr int64_t kMostF32Rows = 192;

enum class Path { gemv, dot, packed };

Path path_of(const GemmArgs& args) {
  if (args.w.column_stride != 1) return Path::packed;
  return args.rows <= kGemvRows ? Path::gemv : Path::dot;
}

GemmKernels::Gemm find_kernel(Isa isa, const GemmArgs& args) {
  const int dtype = static_cast<int>(args.dtype);
  switch (path_of(args)) {
    case Path::gemv:
      return gemm_kernels_table(isa).gemv[dtype];
    case Path::dot:
      return gemm_dot_kernels_table(isa).dot[dtype];
    default:
      return gemm_kernels_table(isa).gemm[dtype];
  }
}

/// Rows whose f32 sums are kept beside y.
int64_t rows_of_sums(const GemmArgs& args) {
  switch (path_of(args)) {
    case Path::gemv:
      return 0;
    case Path::dot:
      return args.dtype == DType::f32 ? 0 : gemm_dot_block_rows(args.rows);
    default:
      return args.rows < kGemmBlockRows ? args.rows : kGemmBlockRows;
  }
}

}  // namespace

bool gemm_is_better(const GemmArgs& args) {
  if (args.dtype == DType::f64 || args.x.column_stride != 1 || args.rows == 0) return false;
  if (args.w.column_stride != 1 && args.w.row_stride != 1) return false;
  if (args.dtype == DType::bf16) return !has_bf16_products();
  if (args.dtype == DType::f16) return !has_f16_products();
  return args.w.column_stride == 1 && args.rows <= kMostF32Rows;
}

bool gemm_takes_low_rank(const GemmArgs& args, int64_t rank, DType b_dtype) {
  return (b_dtype == DType::f32 || b_dtype == args.dtype) && (path_of(args) != Path::gemv || rank <= kGemvRank);
}

int64_t gemm_workspace_bytes(const GemmArgs& args) {
  return rows_of_sums(args) * gemm_sums_stride(args.columns) * static_cast<int64_t>(sizeof(float));
}

Status gemm_cpu(const Context& context, const GemmArgs& args) {
  if (args.dtype == DType::f64) return unsupported("gemm: f64");
  if (args.x.column_stride != 1) return invalid_argument("gemm: x: expected a column stride of 1");
  if (args.w.column_stride != 1 && args.w.row_stride != 1) return invalid_argument("gemm: w: expected a stride of 1");
  const LowRankTerm& term = args.low_rank;
  if (term.rank > 0 && !gemm_takes_low_rank(args, term.rank, term.dtype)) return unsupported("gemm: low-rank term");
  if (term.rank > 0 && term.b.column_stride != 1) return invalid_argument("gemm: b: expected a column stride of 1");
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  const GemmKernels::Gemm kernel = find_kernel(isa, args);
  const int64_t tiles = (args.columns + kGemmColumnTile - 1) / kGemmColumnTile;
  const int64_t tile_work = kGemmColumnTile * args.rows * args.depth;
  parallel_for(context, tiles, grain(tile_work), [&](int64_t begin, int64_t end) {
    const int64_t last = end * kGemmColumnTile < args.columns ? end * kGemmColumnTile : args.columns;
    kernel(begin * kGemmColumnTile, last, args);
  });
  return {};
}

}  // namespace pylora
