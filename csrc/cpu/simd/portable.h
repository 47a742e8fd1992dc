// Plain C++ for the sets without instructions of their own here: the scalar baseline, and NEON. Included by vec.h
// alone.
#pragma once

namespace pylora::PYLORA_ISA {
namespace {

PYLORA_INLINE float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

PYLORA_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

PYLORA_INLINE float to_float(bf16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

PYLORA_INLINE bf16 to_bf16(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

PYLORA_INLINE float to_float(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  if (magnitude >= 0x0f800000u) return float_of_bits(sign | 0x70000000u | magnitude);  // infinity and NaN
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127, and makes subnormals normal on the way.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude) * 0x1p112f));
}

PYLORA_INLINE f16 to_f16(float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Subnormal in f16: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the addition.
    const uint32_t low = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    return {static_cast<uint16_t>(sign | low)};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

PYLORA_INLINE Vec<float> load(const bf16* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i)
    v[i] = to_float(p[i]);
  return v;
}

PYLORA_INLINE Vec<float> load(const f16* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i)
    v[i] = to_float(p[i]);
  return v;
}

PYLORA_INLINE void store(bf16* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i)
    p[i] = to_bf16(v[i]);
}

PYLORA_INLINE void store(f16* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i)
    p[i] = to_f16(v[i]);
}

PYLORA_INLINE void multiply_wide(U32x8 a, uint32_t b, U32x8* low, U32x8* high) {
  for (int i = 0; i < 8; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    (*low)[i] = static_cast<uint32_t>(product);
    (*high)[i] = static_cast<uint32_t>(product >> 32);
  }
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
