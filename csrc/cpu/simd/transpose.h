// In-register transposition of a square block of f32 vectors, for any number of lanes.
#pragma once

#include <utility>

#include "cpu/simd/vec.h"

namespace pylora::PYLORA_ISA {
namespace {

// Swaps the off-diagonal S x S blocks of each 2S x 2S block (Eklundh): log2(lanes) rounds transpose the whole.
template <int S, int... E>
PYLORA_INLINE void transpose_pair(Vec<float>& a, Vec<float>& b, std::integer_sequence<int, E...>) {
  constexpr int kLaneCount = kLanes<float>;
  const Vec<float> low = __builtin_shufflevector(a, b, ((E & S) ? kLaneCount + E - S : E)...);
  const Vec<float> high = __builtin_shufflevector(a, b, ((E & S) ? kLaneCount + E : E + S)...);
  a = low;
  b = high;
}

template <int S>
PYLORA_INLINE void transpose_round(Vec<float>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<float>; ++i) {
    if ((i & S) == 0) transpose_pair<S>(rows[i], rows[i + S], std::make_integer_sequence<int, kLanes<float>>());
  }
}

/// rows[i][j] becomes rows[j][i].
PYLORA_INLINE void transpose(Vec<float>* rows) {
  if constexpr (kLanes<float> >= 16) transpose_round<8>(rows);
  if constexpr (kLanes<float> >= 8) transpose_round<4>(rows);
  transpose_round<2>(rows);
  transpose_round<1>(rows);
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
