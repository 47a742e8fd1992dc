// Rows of f32 sums back into storage.
#pragma once

#include "cpu/simd/vec.h"

namespace pylora::PYLORA_ISA {
namespace {

/// y = round(factor * sums + bias); factor and bias may be null, y may be sums.
template <class T>
void round_row(const float* sums, const float* factor, const T* bias, int64_t count, T* y) {
  int64_t o = 0;
  for (; o + kLanes<float> <= count; o += kLanes<float>) {
    Vec<float> value = load(sums + o);
    if (factor) value *= load(factor + o);
    store(y + o, bias ? value + load(bias + o) : value);
  }
  if (o < count) {
    Vec<float> value = load_partial(sums + o, count - o);
    if (factor) value *= load_partial(factor + o, count - o);
    store_partial(y + o, bias ? value + load_partial(bias + o, count - o) : value, count - o);
  }
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
