// MT19937 by blocks: loops over integers that the compiler vectorises for each instruction set.
#include "uniform/kernels.h"

namespace pylora::PYLORA_ISA {
namespace {

using uniform::Kernels;
using uniform::kStateWords;

/// How far apart the words are that the recurrence combines.
constexpr int64_t kShift = 397;
constexpr uint32_t kHighBit = 0x80000000u, kMatrix = 0x9908b0dfu;
constexpr int kMantissaBits = 24;

inline uint32_t twist(uint32_t word, uint32_t next) {
  const uint32_t mixed = (word & kHighBit) | (next & ~kHighBit);
  return (mixed >> 1) ^ (-(next & 1u) & kMatrix);
}

void next_block(uint32_t* words) {
  // Until the shift wraps around, the words that it reads are the old block's; then they are this one's.
  constexpr int64_t kWrapped = kStateWords - kShift;
  for (int64_t i = 0; i < kWrapped; ++i)
    words[i] = words[i + kShift] ^ twist(words[i], words[i + 1]);
  for (int64_t i = kWrapped; i < kStateWords - 1; ++i)
    words[i] = words[i - kWrapped] ^ twist(words[i], words[i + 1]);
  words[kStateWords - 1] = words[kShift - 1] ^ twist(words[kStateWords - 1], words[0]);
}

void numbers(const uint32_t* words, int64_t count, float bound, float* out) {
  constexpr int32_t kHalf = 1 << (kMantissaBits - 1);
  constexpr float kUnit = 1.0f / kHalf;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t y = words[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    y ^= y >> 18;
    const int32_t k = static_cast<int32_t>(y & ((1u << kMantissaBits) - 1));
    out[i] = static_cast<float>(k - kHalf) * kUnit * bound;  // only the last product rounds
  }
}

}  // namespace

extern const Kernels uniform_kernels;
const Kernels uniform_kernels = {next_block, numbers};

}  // namespace pylora::PYLORA_ISA
