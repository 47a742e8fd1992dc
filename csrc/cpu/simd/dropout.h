// Dropout's multipliers for a run of one row's columns, eight counters (64 columns) at a time.
#pragma once

#include "cpu/simd/vec.h"

namespace pylora::PYLORA_ISA {
namespace {

/// Dropout with the generator's state read, ready for rows.
template <class C>
struct DropoutRow {
  uint32_t key0, key1, offset0, offset1, threshold;
  C keep_scale;

  explicit DropoutRow(const Dropout& dropout)
      : key0(static_cast<uint32_t>(dropout.rng[0])),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(dropout.rng[0]) >> 32)),
        offset0(static_cast<uint32_t>(dropout.rng[1])),
        offset1(static_cast<uint32_t>(static_cast<uint64_t>(dropout.rng[1]) >> 32)),
        threshold(dropout.threshold),
        keep_scale(static_cast<C>(dropout.keep_scale)) {}
};

/// out[i] = 0 where bits[i] < threshold, else keep_scale. Both are below 2^17, so that signed comparison serves.
PYLORA_INLINE void store_multipliers(U32x8 bits, uint32_t threshold, float keep_scale, float* out) {
  typedef int32_t I32x8 __attribute__((vector_size(32)));
  uint32_t scale_bits;
  __builtin_memcpy(&scale_bits, &keep_scale, sizeof scale_bits);
  const U32x8 kept = (U32x8)((I32x8)bits >= I32x8{} + static_cast<int32_t>(threshold));
  const U32x8 multiplier = kept & scale_bits;
  __builtin_memcpy(out, &multiplier, sizeof multiplier);
}

PYLORA_INLINE void store_multipliers(U32x8 bits, uint32_t threshold, double keep_scale, double* out) {
  for (int i = 0; i < 8; ++i)
    out[i] = bits[i] < threshold ? 0.0 : keep_scale;
}

template <class C>
PYLORA_INLINE void dropout_block(const DropoutRow<C>& d, uint32_t row, uint32_t block, C* multiplier) {
  const U32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  U32x8 c0 = lane + 8 * block, c1 = U32x8{} + row, c2 = U32x8{} + d.offset0, c3 = U32x8{} + d.offset1;
  uint32_t key0 = d.key0, key1 = d.key1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    U32x8 low0, high0, low1, high1;
    multiply_wide(c0, kPhiloxMultiplier0, &low0, &high0);
    multiply_wide(c2, kPhiloxMultiplier1, &low1, &high1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const U32x8 words[4] = {c0, c1, c2, c3};
  for (int v = 0; v < 8; ++v) {
    const U32x8 bits = v % 2 ? words[v / 2] >> 16 : words[v / 2] & 0xffff;
    store_multipliers(bits, d.threshold, d.keep_scale, multiplier + 8 * v);
  }
}

/// multiplier[i] = 0 or keep_scale for columns first + i, i in [0, round_up(count, 64)). first is a multiple of 64.
template <class C>
PYLORA_INLINE void dropout_multipliers(const DropoutRow<C>& d, int64_t row, int64_t first, int64_t count,
                                       C* multiplier) {
  for (int64_t i = 0; i < count; i += kDropoutBlock) {
    dropout_block(d, static_cast<uint32_t>(row), static_cast<uint32_t>((first + i) / kDropoutBlock), multiplier + i);
  }
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
