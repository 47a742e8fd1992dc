// The Lanczos launchers on the CPU: steps of the bidiagonalisation, restarts, gram products, and the bidiagonal
// matrix's own values.
#include <cmath>

#include "common/philox.h"
#include "common/sizes.h"
#include "cpu/kernel_table.h"
#include "lanczos/heuristics.h"
#include "lanczos/kernels.h"

PYLORA_KERNEL_TABLE(lanczos::Kernels, lanczos_kernels)

namespace pylora::lanczos {
namespace {

double start_element(uint64_t seed, int64_t row, int64_t i) {
  const PhiloxWords words = philox4x32({{static_cast<uint32_t>(i), static_cast<uint32_t>(row), 0, 0}}, seed);
  return (words.word[0] + 0.5) * 0x1p-31 - 1;
}

/// One call's arguments, kernels and workspace.
class Bidiagonalisation {
 public:
  Bidiagonalisation(const Context& context, const BidiagonaliseArgs& args, const Kernels& kernels)
      : context_(context), args_(args), kernels_(kernels), f64_(args.dtype == DType::f64) {
    char* next = static_cast<char*>(args.workspace);
    const auto take = [&](int64_t bytes) {
      char* block = next;
      next += align_up(bytes);
      return block;
    };
    parts_ = take(num_chunks(args.rows) * args.columns * bytes());
    z_ = take(args.columns * bytes());
    dots_ = take((args.locked + args.end + 1) * bytes());
    squares_ = reinterpret_cast<double*>(take(kMostChunks * static_cast<int64_t>(sizeof(double))));
  }

  void run() {
    if (args_.begin == 0 && args_.end > 0) restart(args_.locked);
    for (int64_t j = args_.begin; j < args_.end; ++j) {
      if (step(j)) continue;
      for (int64_t rest = j; rest < args_.end; ++rest)
        args_.diagonal[rest] = args_.above[rest] = NAN;
      return;
    }
  }

 private:
  int64_t bytes() const { return dtype_bytes(args_.dtype); }
  char* vector(int64_t row) const { return static_cast<char*>(args_.basis) + row * args_.columns * bytes(); }

  /// False where a value is not finite.
  bool step(int64_t j) {
    const int64_t row = args_.locked + j;
    // β_{j-1} u_{j-1}, where left holds α_{j-1} u_{j-1}.
    const bool goes_on = j > 0 && args_.diagonal[j - 1] > 0;
    const double alpha = std::sqrt(multiply(row, goes_on ? args_.above[j - 1] / args_.diagonal[j - 1] : 0));
    // The large part, α² v_j, is taken out by itself. What is then left of V in z is rounding, and taking that out once is
    // enough unless little remains.
    const double before = take_out(row, row + 1), once = take_out(0, row + 1);
    const bool is_again = once < kKeptShare * before;
    const double twice = is_again ? take_out(0, row + 1) : once;
    const double beta = alpha > 0 ? twice / alpha : 0;
    if (!std::isfinite(alpha) || !std::isfinite(beta)) return false;
    double largest = alpha;
    for (int64_t i = 0; i < j; ++i)
      largest = std::fmax(largest, args_.diagonal[i]);
    // Below this a value is rounding, and so is what gets shorter when it is orthogonalised again ("twice is enough",
    // Parlett, The symmetric eigenvalue problem, 6.9): a vector made of it would not be orthogonal to the others.
    const double negligible = roundoff(args_.dtype) * largest;
    const bool spanned = alpha <= negligible || beta <= negligible || (is_again && twice < 0.5 * once);
    args_.diagonal[j] = alpha <= negligible ? 0 : alpha;
    args_.above[j] = spanned ? 0 : beta;
    if (spanned) {
      restart(row + 1);
    } else {
      kernels_.scale[f64_](args_.columns, z_, 1 / (alpha * beta), vector(row + 1));
    }
    return true;
  }

  /// left = W v - carry left, z = Wᵀ left, in one pass over W; returns |left|².
  double multiply(int64_t row, double carry) {
    const int64_t step = chunk_rows(args_.rows), chunks = num_chunks(args_.rows);
    parallel_for(context_, chunks, grain(step * args_.columns), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t last = (chunk + 1) * step < args_.rows ? (chunk + 1) * step : args_.rows;
        squares_[chunk] = kernels_.pass[f64_](chunk * step, last, args_.matrix, args_.columns, vector(row), carry,
                                              args_.left, parts_ + chunk * args_.columns * bytes());
      }
    });
    parallel_for(context_, args_.columns, grain(chunks), [&](int64_t begin, int64_t end) {
      kernels_.reduce[f64_](begin, end, parts_, chunks, args_.columns, z_);
    });
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      sum += squares_[chunk];
    return sum;
  }

  /// Takes the vectors [first, last) of the basis out of z; returns |z|. What is left of a large part after one call is
  /// its rounding.
  double take_out(int64_t first, int64_t last) {
    parallel_for(context_, last - first, grain(args_.columns), [&](int64_t begin, int64_t end) {
      kernels_.project[f64_](begin, end, vector(first), args_.columns, z_, dots_);
    });
    parallel_for(context_, args_.columns, grain(last - first), [&](int64_t begin, int64_t end) {
      kernels_.subtract[f64_](begin, end, vector(first), last - first, args_.columns, dots_, z_);
    });
    return std::sqrt(kernels_.squares[f64_](args_.columns, z_));
  }

  /// A random direction for `row`: the first one, or the next where V spans an invariant space.
  void restart(int64_t row) {
    for (int64_t i = 0; i < args_.columns; ++i) {
      const double value = start_element(args_.seed, row, i);
      if (f64_) {
        reinterpret_cast<double*>(z_)[i] = value;
      } else {
        reinterpret_cast<float*>(z_)[i] = static_cast<float>(value);
      }
    }
    take_out(0, row);
    const double norm = take_out(0, row);
    kernels_.scale[f64_](args_.columns, z_, norm > 0 ? 1 / norm : 0, vector(row));
  }

  const Context& context_;
  const BidiagonaliseArgs& args_;
  const Kernels& kernels_;
  const bool f64_;
  char *parts_, *z_, *dots_;
  double* squares_;
};

// ---- the gram product ----

/// Elements of X in panels, the last one filled up.
int64_t packed_elements(const GramArgs& args, int64_t panel) {
  return (args.width + panel - 1) / panel * panel * args.columns;
}

template <class C>
void pack(const GramArgs& args, int64_t panel, C* packed) {
  const C* x = static_cast<const C*>(args.x.data);
  for (int64_t first = 0; first < args.width; first += panel)
    for (int64_t k = 0; k < args.columns; ++k)
      for (int64_t i = first; i < first + panel; ++i)
        *packed++ = i < args.width ? x[k * args.x.row_stride + i * args.x.column_stride] : C(0);
}

template <class C>
void unpack(const GramArgs& args, int64_t panel, const C* packed) {
  C* out = static_cast<C*>(args.out);
  for (int64_t first = 0; first < args.width; first += panel)
    for (int64_t k = 0; k < args.columns; ++k)
      for (int64_t i = first; i < first + panel; ++i, ++packed)
        if (i < args.width) out[k * args.width + i] = *packed;
}

template <class C>
void gram_product(const Context& context, const GramArgs& args, const Kernels& kernels) {
  constexpr bool kF64 = sizeof(C) == 8;
  const int64_t panel = kernels.panel[kF64], elements = packed_elements(args, panel);
  const int64_t panels = (args.width + panel - 1) / panel;
  const int64_t step = gram_chunk_rows(args.rows), chunks = gram_chunks(args.rows);
  C* packed = static_cast<C*>(args.workspace);
  C* parts = packed + align_up(elements * sizeof(C)) / static_cast<int64_t>(sizeof(C));
  pack(args, panel, packed);
  parallel_for(context, chunks, grain(2 * step * elements), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = (chunk + 1) * step < args.rows ? (chunk + 1) * step : args.rows;
      kernels.gram[kF64](chunk * step, last, args.matrix, args.columns, panels, packed, parts + chunk * elements);
    }
  });
  parallel_for(context, elements, grain(chunks),
               [&](int64_t begin, int64_t end) { kernels.reduce[kF64](begin, end, parts, chunks, elements, packed); });
  unpack(args, panel, packed);
}

// ---- values of B ----

constexpr int kMostSweeps = 60;  // of one eigenvalue; two are usual

/// Where the block of the tridiagonal matrix that starts at `first` ends: the first negligible element.
int64_t block_end(const double* d, const double* e, int64_t first, int64_t count) {
  int64_t last = first;
  while (last + 1 < count && std::fabs(e[last]) > 0x1p-52 * (std::fabs(d[last]) + std::fabs(d[last + 1])))
    ++last;
  return last;
}

/// One implicit QL sweep over rows [first, last] with Wilkinson's shift; `row` is a row of the eigenvectors so far.
void sweep(double* d, double* e, double* row, int64_t first, int64_t last) {
  const double half = (d[first + 1] - d[first]) / (2 * e[first]);
  const double root = std::sqrt(half * half + 1);
  double bulge = d[last] - d[first] + e[first] / (half + std::copysign(root, half));
  double s = 1, c = 1, carried = 0;
  for (int64_t i = last - 1; i >= first; --i) {
    const double f = s * e[i], g = c * e[i];
    const double r = std::sqrt(f * f + bulge * bulge);
    e[i + 1] = r;
    if (r == 0) {  // the block splits
      d[i + 1] -= carried;
      e[last] = 0;
      return;
    }
    s = f / r;
    c = bulge / r;
    const double shifted = d[i + 1] - carried;
    const double t = (d[i] - shifted) * s + 2 * c * g;
    carried = s * t;
    d[i + 1] = shifted + carried;
    bulge = c * t - g;
    const double upper = row[i], lower = row[i + 1];
    row[i + 1] = s * upper + c * lower;
    row[i] = c * upper - s * lower;
  }
  d[first] -= carried;
  e[first] = bulge;
  e[last] = 0;
}

/// Eigenvalues of the symmetric tridiagonal matrix in d, and `row` times its eigenvectors; false: not converged.
bool diagonalise(double* d, double* e, double* row, int64_t count) {
  for (int64_t first = 0; first < count; ++first) {
    for (int sweeps = 0;; ++sweeps) {
      const int64_t last = block_end(d, e, first, count);
      if (last == first) break;
      if (sweeps == kMostSweeps) return false;
      sweep(d, e, row, first, last);
    }
  }
  return true;
}

}  // namespace

void start_vector(uint64_t seed, int64_t row, int64_t columns, double* out) {
  for (int64_t i = 0; i < columns; ++i)
    out[i] = start_element(seed, row, i);
}

int64_t bidiagonalise_workspace_bytes(const BidiagonaliseArgs& args) {
  const int64_t bytes = dtype_bytes(args.dtype);
  return align_up(num_chunks(args.rows) * args.columns * bytes) + align_up(args.columns * bytes) +
         align_up((args.locked + args.end + 1) * bytes) + align_up(kMostChunks * static_cast<int64_t>(sizeof(double)));
}

Status bidiagonalise_cpu(const Context& context, const BidiagonaliseArgs& args) {
  if (args.rows < 0 || args.columns < 0) return invalid_argument("bidiagonalise: matrix: negative size");
  if (args.dtype != DType::f32 && args.dtype != DType::f64) return unsupported("bidiagonalise: expected f32 or f64");
  if (args.matrix.column_stride != 1) return invalid_argument("bidiagonalise: matrix: expected a column stride of 1");
  if (args.begin < 0 || args.end < args.begin || args.locked < 0)
    return invalid_argument("bidiagonalise: expected 0 <= begin <= end and locked >= 0");
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  Bidiagonalisation(context, args, lanczos_kernels_table(isa)).run();
  return {};
}

Status gram_product_workspace_bytes(const GramArgs& args, int64_t* bytes) {
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  const int64_t panel = lanczos_kernels_table(isa).panel[args.dtype == DType::f64];
  const int64_t packed = packed_elements(args, panel) * dtype_bytes(args.dtype);
  *bytes = align_up(packed) + gram_chunks(args.rows) * packed;
  return {};
}

Status gram_product_cpu(const Context& context, const GramArgs& args) {
  if (args.rows < 0 || args.columns < 0 || args.width < 0) return invalid_argument("gram_product: negative size");
  if (args.dtype != DType::f32 && args.dtype != DType::f64) return unsupported("gram_product: expected f32 or f64");
  if (args.matrix.column_stride != 1) return invalid_argument("gram_product: matrix: expected a column stride of 1");
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  const Kernels& kernels = lanczos_kernels_table(isa);
  args.dtype == DType::f64 ? gram_product<double>(context, args, kernels) : gram_product<float>(context, args, kernels);
  return {};
}

Status ritz_residuals_cpu(const RitzArgs& args) {
  const int64_t steps = args.steps;
  if (args.rank < 0 || args.rank > steps) return invalid_argument("ritz_residuals: rank: expected 0 to steps");
  double *d = args.workspace, *e = d + steps, *row = e + steps;
  for (int64_t i = 0; i < steps; ++i) {
    const bool is_last = i + 1 == steps;
    const double next = is_last ? 0 : args.above[i];
    d[i] = args.diagonal[i] * args.diagonal[i] + next * next;
    e[i] = is_last ? 0 : next * args.diagonal[i + 1];
    row[i] = is_last ? 1 : 0;
  }
  bool found = true;
  for (int64_t i = 0; i < steps; ++i)
    found = found && std::isfinite(d[i]) && std::isfinite(e[i]);
  found = found && diagonalise(d, e, row, steps);
  for (int64_t i = 0; i < args.rank; ++i) {
    int64_t best = 0;
    for (int64_t j = 1; j < steps; ++j)
      if (d[j] > d[best]) best = j;
    args.values[i] = found ? std::sqrt(std::fmax(d[best], 0)) : NAN;
    args.residuals[i] = found ? std::fabs(row[best] * args.above[steps - 1]) : NAN;
    d[best] = -INFINITY;  // taken
  }
  return {};
}

}  // namespace pylora::lanczos
