// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), and where dropout
// finds an element's 16 random bits. CPU, CUDA and the reference in pylora/ops/reference/philox.py share this layout.
//
// Element (row, column) of a [num_tokens, width] tensor: let block = column / 64, inner = column % 64, v = inner / 8.
//   key     = {seed low, seed high}
//   counter = {8 * block + inner % 8, row, offset low, offset high}
//   bits    = word v / 2 of the result, low half if v is even, high half if it is odd
// It is dropped if bits < threshold. Eight SIMD lanes give 64 neighbouring columns; the fragments of an mma.m16n8k16
// hold whole counters, so no thread of a GPU kernel draws bits that it throws away.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYLORA_HOST_DEVICE __host__ __device__
#else
#define PYLORA_HOST_DEVICE
#endif

namespace pylora {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
/// Columns that share a run of eight counters.
constexpr int64_t kDropoutBlock = 64;

struct PhiloxWords {
  uint32_t word[4];
};

PYLORA_HOST_DEVICE constexpr PhiloxWords philox4x32(PhiloxWords counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter.word[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter.word[2];
    counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

/// Dropout as the kernels take it. threshold 0: nothing is dropped; 65536: everything is.
struct Dropout {
  uint32_t threshold = 0;  // round(p * 65536)
  double keep_scale = 1;   // 65536 / (65536 - threshold), 0 where everything is dropped: the mean is kept exactly
  /// int64 [2] {seed, offset}, in the memory of the device that runs the op, so that a replayed CUDA graph draws
  /// anew.
  const int64_t* rng = nullptr;

  PYLORA_HOST_DEVICE constexpr bool active() const { return threshold != 0; }
};

/// p in [0, 1], rounded to a multiple of 2^-16.
constexpr Dropout make_dropout(double p, const int64_t* rng) {
  Dropout dropout;
  dropout.threshold = static_cast<uint32_t>(p * 65536.0 + 0.5);
  dropout.keep_scale = dropout.threshold >= 65536 ? 0.0 : 65536.0 / (65536.0 - dropout.threshold);
  dropout.rng = rng;
  return dropout;
}

}  // namespace pylora
