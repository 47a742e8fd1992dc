// Sums of mma as memory wants them: eight neighbouring columns a lane, in place of pairs.
#pragma once

#include "cuda/device.cuh"

namespace pylora::cuda {

/// Lane t of a quad has the column pairs {2 t, 2 t + 1} of four tiles of eight columns; afterwards it has tile t's eight
/// columns.
PYLORA_DEVICE void transpose_quad(float (&pairs)[4][2], int t) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = t & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const int k = j | step;  // lower lanes send k and keep j, upper lanes send j and keep k
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float got = __shfl_xor_sync(kAllLanes, upper ? pairs[j][i] : pairs[k][i], step);
        (upper ? pairs[j][i] : pairs[k][i]) = got;
      }
    }
  }
}

}  // namespace pylora::cuda
