// Arithmetic and rounding of a merge on a GPU: the CPU's (exact.h, row.h), bit for bit. Nothing here is left to the
// compiler to contract.
#pragma once

#include "cuda/device.cuh"

namespace pylora::merge {

PYLORA_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
PYLORA_DEVICE float subtract_rn(float a, float b) { return __fsub_rn(a, b); }
PYLORA_DEVICE float multiply_rn(float a, float b) { return __fmul_rn(a, b); }
PYLORA_DEVICE float multiply_add_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PYLORA_DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
PYLORA_DEVICE double subtract_rn(double a, double b) { return __dsub_rn(a, b); }
PYLORA_DEVICE double multiply_rn(double a, double b) { return __dmul_rn(a, b); }
PYLORA_DEVICE double multiply_add_rn(double a, double b, double c) { return __fma_rn(a, b, c); }

/// Every NaN becomes the same one.
PYLORA_DEVICE float one_nan(float v) { return v == v ? v : cuda::bit_cast<float>(uint32_t{0x7fc00000}); }
PYLORA_DEVICE double one_nan(double v) { return v == v ? v : cuda::bit_cast<double>(uint64_t{0x7ff8000000000000}); }

template <size_t Bytes>
struct BitsOfSize;
template <>
struct BitsOfSize<2> {
  using type = uint16_t;
};
template <>
struct BitsOfSize<4> {
  using type = uint32_t;
};
template <>
struct BitsOfSize<8> {
  using type = uint64_t;
};
template <class T>
using BitsOf = typename BitsOfSize<sizeof(T)>::type;

template <class T>
PYLORA_DEVICE Accumulator<T> value_of(BitsOf<T> bits) {
  return cuda::widen(cuda::bit_cast<T>(bits));
}

/// To nearest even. v: one_nan's.
template <class T>
PYLORA_DEVICE BitsOf<T> round_to(Accumulator<T> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = cuda::bit_cast<uint32_t>(v);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else if constexpr (std::is_same_v<T, f16>) {
    return v == v ? cuda::narrow<f16>(v).bits : uint16_t{0x7e00};
  } else {
    return cuda::bit_cast<BitsOf<T>>(v);
  }
}

/// As taking out rounds: bf16 away from zero at ties, which is an addition.
template <class T>
PYLORA_DEVICE BitsOf<T> round_back(Accumulator<T> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return static_cast<uint16_t>((cuda::bit_cast<uint32_t>(v) + 0x8000) >> 16);
  } else {
    return round_to<T>(v);
  }
}

// Codes of a payload that are no difference.
constexpr int kInFull = -128, kIsMinusZero = -127;

template <class Bits>
constexpr Bits kMinusZero = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));

/// What turns `back` into `w`: the difference, or one of the two codes above.
template <class Bits>
PYLORA_DEVICE int8_t code_of(Bits w, Bits back) {
  const auto difference = static_cast<std::make_signed_t<Bits>>(static_cast<Bits>(w - back));
  if (difference >= -126 && difference <= 126) return static_cast<int8_t>(difference);
  return static_cast<int8_t>(w == kMinusZero<Bits> ? kIsMinusZero : kInFull);
}

/// A chunk's checksum is the sum of its elements' mixes modulo 2^32: threads may add in any order. A mix is one to one in
/// each 32 bits of the element, so that no change of one element is lost (of f64: of one half), and of several with
/// probability 2^-32.
PYLORA_DEVICE uint32_t mix(uint32_t bits, uint32_t position) {
  const uint32_t product = (bits ^ position * 0x9e3779b9u) * 0x85ebca6bu;
  return product ^ product >> 16;
}
template <class Bits>
PYLORA_DEVICE uint32_t mix_element(Bits bits, int position) {
  const auto place = static_cast<uint32_t>(position);
  if constexpr (sizeof(Bits) == 8) {
    return mix(static_cast<uint32_t>(bits), 2 * place) + mix(static_cast<uint32_t>(bits >> 32), 2 * place + 1);
  } else {
    return mix(bits, place);
  }
}

}  // namespace pylora::merge
