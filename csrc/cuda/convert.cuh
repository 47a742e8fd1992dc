// Element conversions: storage to accumulator and back, one at a time and in pairs as mma fragments hold them.
#pragma once

#include "common/dtype.h"
#include "cuda/platform.cuh"

namespace pylora::cuda {

PYLORA_DEVICE float widen(float value) { return value; }
PYLORA_DEVICE double widen(double value) { return value; }

PYLORA_DEVICE float widen(bf16 value) {
#if defined(PYLORA_EMULATE)
  return emu::bf16_to_f32(value.bits);
#else
  return __bfloat162float(bit_cast<__nv_bfloat16>(value));
#endif
}

PYLORA_DEVICE float widen(f16 value) {
#if defined(PYLORA_EMULATE)
  return emu::f16_to_f32(value.bits);
#else
  return __half2float(bit_cast<__half>(value));
#endif
}

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  static PYLORA_DEVICE float of(float value) { return value; }
};
template <>
struct Narrow<double> {
  static PYLORA_DEVICE double of(double value) { return value; }
};
template <>
struct Narrow<bf16> {
  static PYLORA_DEVICE bf16 of(float value) {
#if defined(PYLORA_EMULATE)
    return {emu::f32_to_bf16(value)};
#else
    return bit_cast<bf16>(__float2bfloat16_rn(value));
#endif
  }
};
template <>
struct Narrow<f16> {
  static PYLORA_DEVICE f16 of(float value) {
#if defined(PYLORA_EMULATE)
    return {emu::f32_to_f16(value)};
#else
    return bit_cast<f16>(__float2half_rn(value));
#endif
  }
};

/// Rounds to nearest even.
template <class T>
PYLORA_DEVICE T narrow(Accumulator<T> value) {
  return Narrow<T>::of(value);
}

/// Two 16-bit elements in a word, `low` in the lower half: the order of neighbours in memory.
template <class T>
PYLORA_DEVICE uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2, "pairs of 16-bit elements");
#if defined(PYLORA_EMULATE)
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
#else
  if constexpr (std::is_same_v<T, bf16>) {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  } else {
    return bit_cast<uint32_t>(__floats2half2_rn(low, high));
  }
#endif
}

template <class T>
PYLORA_DEVICE float2 unpack(uint32_t word) {
  static_assert(sizeof(T) == 2, "pairs of 16-bit elements");
  const T low{static_cast<uint16_t>(word)}, high{static_cast<uint16_t>(word >> 16)};
  return {widen(low), widen(high)};
}

/// f32 with the mantissa that tf32 tensor cores read, rounded to nearest, ties away from zero.
PYLORA_DEVICE uint32_t to_tf32(float value) {
#if defined(PYLORA_EMULATE)
  return emu::f32_to_tf32(value);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

}  // namespace pylora::cuda
