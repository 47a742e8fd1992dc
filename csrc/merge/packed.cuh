// A change as the kernels read it: factors of all adapters one below the other, with scaling and row scales in them.
#pragma once

#include "cuda/grid.cuh"
#include "merge/heuristics.h"

namespace pylora::merge {

/// Elements [matrix][rank][feature], of f32, f64 or bf16; `low`: as many bf16 that add what the first could not hold.
struct PackedSide {
  const void* data = nullptr;
  const void* low = nullptr;
  int64_t line = 0;  // features, padded
};

struct PackedFactors {
  int64_t rank = 0;
  PackedSide left, right;
  /// Accumulators along the scaled side, padded with ones; null: no row scales.
  const void* scale = nullptr;
  const void* inverse = nullptr;
};

/// Queues what packs `change` into memory of packed_bytes_cuda(w, change, tensor_cores) bytes.
Status pack_cuda(const Context& context, const Weight& w, const Change& change, bool tensor_cores, void* memory,
                 PackedFactors* packed);

}  // namespace pylora::merge
