// The gemm launcher: which products it takes, its workspace, and sharing out columns.
#include "cpu/gemm.h"

#include "common/sizes.h"
#include "cpu/gemm_kernels.h"
#include "cpu/kernel_table.h"

PYLORA_KERNEL_TABLE(GemmKernels, gemm_kernels)

namespace pylora {
namespace {

bool takes_gemv(const GemmArgs& args) { return args.rows <= kGemvRows && args.w.column_stride == 1; }

int64_t block_rows(const GemmArgs& args) { return args.rows < kGemmBlockRows ? args.rows : kGemmBlockRows; }

}  // namespace

bool gemm_is_better(const GemmArgs& args) {
  if (args.dtype == DType::f64 || args.x.column_stride != 1 || args.rows == 0) return false;
  if (args.w.column_stride != 1 && args.w.row_stride != 1) return false;
  if (args.dtype == DType::bf16) return !has_bf16_products();
  if (args.dtype == DType::f16) return !has_f16_products();
  // MKL packs better for many rows, and for the few that a tile leaves half empty.
  return args.w.column_stride == 1 && args.rows <= kGemmBlockRows;
}

bool gemm_takes_low_rank(const GemmArgs& args, int64_t rank, DType b_dtype) {
  return (b_dtype == DType::f32 || b_dtype == args.dtype) && (!takes_gemv(args) || rank <= kGemvRank);
}

int64_t gemm_workspace_bytes(const GemmArgs& args) {
  return takes_gemv(args) ? 0 : block_rows(args) * gemm_sums_stride(args.columns) * static_cast<int64_t>(sizeof(float));
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
  const GemmKernels& kernels = gemm_kernels_table(isa);
  const auto kernel = (takes_gemv(args) ? kernels.gemv : kernels.gemm)[static_cast<int>(args.dtype)];
  const int64_t tiles = (args.columns + kGemmColumnTile - 1) / kGemmColumnTile;
  const int64_t tile_work = kGemmColumnTile * args.rows * args.depth;
  parallel_for(context, tiles, grain(tile_work), [&](int64_t begin, int64_t end) {
    const int64_t last = end * kGemmColumnTile < args.columns ? end * kGemmColumnTile : args.columns;
    kernel(begin * kGemmColumnTile, last, args);
  });
  return {};
}

}  // namespace pylora
