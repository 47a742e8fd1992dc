// The lora launchers on the CPU: check, lay out the workspace, share out tokens (shrink, expand) or columns
// (gradients).
#include "cpu/kernel_table.h"
#include "lora/heuristics.h"
#include "lora/kernels.h"

PYLORA_KERNEL_TABLE(lora::Kernels, lora_kernels)

namespace pylora::lora {
namespace {

/// Hands out aligned blocks of the caller's workspace in the order that heuristics.h counts them.
class Workspace {
 public:
  explicit Workspace(void* base) : next_(static_cast<char*>(base)) {}

  void* take(int64_t bytes) {
    char* block = next_;
    next_ += bytes;
    return block;
  }

 private:
  char* next_;
};

int index(DType dtype) { return static_cast<int>(dtype); }

Status find_kernels(const Kernels** kernels) {
  Isa isa;
  const Status status = current_isa(&isa);
  *kernels = &lora_kernels_table(isa);
  return status;
}

Status check_shape(const Shape& s) {
  if (s.num_tokens < 0 || s.in_features < 0 || s.out_features < 0) return invalid_argument("lora: negative size");
  if (s.rank < 1) return invalid_argument("lora: rank: expected at least 1");
  return {};
}

/// The factor as contiguous rows of accumulators: itself where it is that already, else converted into `space`.
const void* as_rows(const Kernels& kernels, const Shape& s, ConstMatrix m, int64_t width, void* space) {
  if (is_rows(s, m, width)) return m.data;
  kernels.convert[index(s.factor_dtype)][accumulator_dtype(s.dtype) == DType::f64](m, s.rank, width, space);
  return space;
}

ConstMatrix transposed(ConstMatrix m) { return {m.data, m.column_stride, m.row_stride}; }

}  // namespace

Status forward_cpu(const Context& context, const ForwardArgs& args) {
  const Shape& s = args.shape;
  if (const Status status = check_shape(s); !status.is_ok()) return status;
  const Kernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;

  Workspace workspace(args.workspace);
  const void* a = as_rows(*kernels, s, args.a, s.in_features, workspace.take(block_bytes(s, s.rank, s.in_features)));
  const void* b =
      as_rows(*kernels, s, transposed(args.b), s.out_features, workspace.take(block_bytes(s, s.rank, s.out_features)));
  parallel_for(
      context, s.num_tokens, grain(s.rank * (s.in_features + s.out_features)), [&](int64_t begin, int64_t end) {
        kernels->shrink[index(s.dtype)](begin, end, args.x, s.in_features, a, s.rank, 1.0, args.dropout, args.v);
        kernels->expand[index(s.dtype)](begin, end, args.v, b, s.rank, args.scaling, Dropout{}, args.y, s.out_features);
      });
  return {};
}

Status shrink_cpu(const Context& context, const ShrinkArgs& args) {
  const Shape& s = args.shape;
  if (const Status status = check_shape(s); !status.is_ok()) return status;
  const Kernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;

  const void* a = as_rows(*kernels, s, args.a, s.in_features, args.workspace);
  parallel_for(context, s.num_tokens, grain(s.rank * s.in_features), [&](int64_t begin, int64_t end) {
    kernels->shrink[index(s.dtype)](begin, end, args.x, s.in_features, a, s.rank, 1.0, args.dropout, args.v);
  });
  return {};
}

Status backward_cpu(const Context& context, const BackwardArgs& args) {
  const Shape& s = args.shape;
  if (const Status status = check_shape(s); !status.is_ok()) return status;
  const Kernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;

  Workspace workspace(args.workspace);
  const int64_t a_bytes = block_bytes(s, s.rank, s.in_features), b_bytes = block_bytes(s, s.rank, s.out_features);
  const void* a = as_rows(*kernels, s, args.a, s.in_features, workspace.take(a_bytes));
  const void* b = nullptr;
  void* b_space = workspace.take(b_bytes);
  if (!args.g) b = as_rows(*kernels, s, transposed(args.b), s.out_features, b_space);
  void* own_g = workspace.take(block_bytes(s, s.num_tokens, s.rank));
  const void* g = args.g ? args.g : own_g;
  void* da_sums = workspace.take(a_bytes);
  void* db_sums = workspace.take(b_bytes);

  if (args.dx.data || args.da) {
    const int64_t work = s.rank * ((args.g ? 0 : s.out_features) + (args.dx.data ? s.in_features : 0));
    parallel_for(context, s.num_tokens, grain(work), [&](int64_t begin, int64_t end) {
      if (!args.g) {
        kernels->shrink[index(s.dtype)](begin, end, args.dy, s.out_features, b, s.rank, args.scaling, Dropout{}, own_g);
      }
      if (args.dx.data) {
        kernels->expand[index(s.dtype)](begin, end, g, a, s.rank, 1.0, args.dropout, args.dx, s.in_features);
      }
    });
  }
  const bool f64 = accumulator_dtype(s.dtype) == DType::f64;
  const auto factor_gradient = [&](const void* v, ConstMatrix x, int64_t width, double scaling, const Dropout& dropout,
                                   void* sums, bool transpose, void* out) {
    const int64_t blocks = (width + kDropoutBlock - 1) / kDropoutBlock;
    parallel_for(context, blocks, grain(kDropoutBlock * s.rank * s.num_tokens), [&](int64_t begin, int64_t end) {
      const int64_t last = end * kDropoutBlock < width ? end * kDropoutBlock : width;
      kernels->outer[index(s.dtype)](begin * kDropoutBlock, last, v, s.rank, x, s.num_tokens, width, scaling, dropout,
                                     sums);
    });
    kernels->round[index(s.factor_dtype)][f64](sums, s.rank, width, transpose, out);
  };
  if (args.da) factor_gradient(g, args.x, s.in_features, 1.0, args.dropout, da_sums, false, args.da);
  if (args.db) factor_gradient(args.v, args.dy, s.out_features, args.scaling, Dropout{}, db_sums, true, args.db);
  return {};
}

Status dropout_cpu(const Context& context, const DropoutArgs& args) {
  const Kernels* kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;
  parallel_for(context, args.num_tokens, grain(args.width), [&](int64_t begin, int64_t end) {
    kernels->drop[index(args.dtype)](begin, end, args.x, args.width, args.dropout, args.out);
  });
  return {};
}

}  // namespace pylora::lora
