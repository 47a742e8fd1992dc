// Conversions of 16-bit elements and tf32 as the hardware does them: to nearest even (tf32: ties away from zero), one
// pattern for NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace pylora::emu {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
constexpr uint16_t kNan16 = 0x7fff;

inline float bf16_to_f32(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & kMagnitude) > kInfinity) return kNan16;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_f32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = static_cast<uint32_t>(bits & 0x7fffu)
                                                                                 << 13;
  if ((bits & 0x7c00u) == 0x7c00u) return float_of(sign | kInfinity | magnitude);
  // The exponents' biases differ by 112; the product is exact, of subnormal numbers too.
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

inline uint16_t f32_to_f16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & kMagnitude;
  if (magnitude > kInfinity) return kNan16;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on: infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the results are multiples of 2^-24, and so are floats from 0.5 on: the sum rounds as it should.
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13);
}

constexpr uint32_t kTf32Bits = 0xffffe000u;  // what tensor cores read of a tf32 operand

inline uint32_t f32_to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  return (bits & kMagnitude) >= kInfinity ? bits : (bits + 0x1000u) & kTf32Bits;
}

}  // namespace pylora::emu
