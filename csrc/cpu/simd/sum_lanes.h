// The lanes of four vectors summed at once, in the order of horizontal_sum.
#pragma once

#include <utility>

#include "cpu/simd/vec.h"

namespace pylora::PYLORA_ISA {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));

template <class V, int... E>
PYLORA_INLINE auto add_halves(V v, std::integer_sequence<int, E...>) {
  constexpr int kHalf = sizeof...(E);
  return __builtin_shufflevector(v, v, E...) + __builtin_shufflevector(v, v, (E + kHalf)...);
}

/// Halves added until four lanes are left.
template <class V>
PYLORA_INLINE Four to_four(V v) {
  constexpr int kCount = static_cast<int>(sizeof(V) / sizeof(float));
  if constexpr (kCount == 4) {
    return v;
  } else {
    return to_four(add_halves(v, std::make_integer_sequence<int, kCount / 2>()));
  }
}

/// The sums of v[0] to v[3].
PYLORA_INLINE Four sum_lanes(const Vec<float>* v) {
  const Four a = to_four(v[0]), b = to_four(v[1]), c = to_four(v[2]), d = to_four(v[3]);
  const Four ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  const Four cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
  return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
