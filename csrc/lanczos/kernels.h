// The kernels of one instruction set; "C" is the matrix's type, f32 or f64. All vectors are contiguous.
#pragma once

#include "lanczos/lanczos.h"

namespace pylora::lanczos {

/// Rows that are read twice in a row, the second time from the cache.
constexpr int64_t kRowTile = 4;
/// The same of a gram product: not more, since rows at a distance of 4 KiB share the eight places of one set in L1.
constexpr int64_t kGramRows = 8;

struct Kernels {
  /// For rows [begin, end): left = W v - carry left; C sums[columns] = Wᵀ left; returns the sum of left².
  using Pass = double (*)(int64_t begin, int64_t end, ConstMatrix w, int64_t columns, const void* v, double carry,
                          void* left, void* sums);
  /// C dots[j] = basis[j] · x for j in [begin, end).
  using Project = void (*)(int64_t begin, int64_t end, const void* basis, int64_t columns, const void* x, void* dots);
  /// x[i] -= Σ_j dots[j] basis[j, i] over `vectors` rows, for i in [begin, end).
  using Subtract = void (*)(int64_t begin, int64_t end, const void* basis, int64_t vectors, int64_t columns,
                            const void* dots, void* x);
  /// x[i] = Σ_p parts[p, i] in order, for i in [begin, end).
  using Reduce = void (*)(int64_t begin, int64_t end, const void* parts, int64_t num_parts, int64_t columns, void* x);
  /// Σ x².
  using Squares = double (*)(int64_t columns, const void* x);
  /// out = x * scale.
  using Scale = void (*)(int64_t columns, const void* x, double scale, void* out);

  /// C sums = Wᵀ(W X) of the rows [begin, end). X and sums are [panels, columns, panel[f64]].
  using Gram = void (*)(int64_t begin, int64_t end, ConstMatrix w, int64_t columns, int64_t panels, const void* x,
                        void* sums);

  // Indexed by whether C is f64.
  Pass pass[2];
  Project project[2];
  Subtract subtract[2];
  Reduce reduce[2];
  Squares squares[2];
  Scale scale[2];
  Gram gram[2];
  int64_t panel[2];  // columns of X that one gram kernel holds in registers
};

}  // namespace pylora::lanczos
