// Uniform random numbers from a Mersenne twister (MT19937) whose state is the caller's.
//
// Numerics. u = (word mod 2^24) / 2^24 and out = bound * (2 u - 1) rounded once to f32. The words are the reference
// generator's, so that the result depends on the state alone.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace pylora::uniform {

constexpr int64_t kStateWords = 624;

/// The words of a block come out in order; the first `taken` of this one have.
struct Mt19937 {
  uint32_t* words = nullptr;  // [kStateWords]
  int64_t taken = kStateWords;
};

struct FillArgs {
  int64_t skip = 0;      // words to pass over before the first number
  int64_t count = 0;     // numbers to write, one word each
  float bound = 1;       // they are in [-bound, bound)
  float* out = nullptr;  // [count]
};

/// Advances `state` by skip + count words. `taken` is then that of the last word's block, from 1 to kStateWords; with
/// no word at all the state stays as it is.
Status fill_cpu(const FillArgs& args, Mt19937* state);

}  // namespace pylora::uniform
