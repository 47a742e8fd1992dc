// The kernels of one instruction set.
#pragma once

#include "uniform/uniform.h"

namespace pylora::uniform {

struct Kernels {
  /// The next block of words, in place.
  void (*next_block)(uint32_t* words);
  /// The numbers of `count` words.
  void (*numbers)(const uint32_t* words, int64_t count, float bound, float* out);
};

}  // namespace pylora::uniform
