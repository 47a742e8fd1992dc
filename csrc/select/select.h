// Selection by magnitude without sorting: the count-th largest |x|, and x without what is smaller.
//
// Magnitudes are compared as the bits of the value without its sign, which have the order of the magnitudes; every NaN
// is larger than infinity, and larger than or equal to another NaN as its bits say. No arithmetic, so the result has no
// rounding and depends on neither threads nor instruction set.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/status.h"

namespace pylora::select {

struct ThresholdArgs {
  int64_t size = 0;  // of x, contiguous, any dtype
  DType dtype = DType::f32;
  const void* x = nullptr;
  int64_t count = 0;          // 1 to size
  void* workspace = nullptr;  // threshold_workspace_bytes(size, dtype), aligned to 8
};

struct Threshold {
  uint64_t bits = 0;   // of the count-th largest magnitude
  int64_t larger = 0;  // elements that are strictly larger
  int64_t equal = 0;   // elements of that magnitude, at least count - larger
};

int64_t threshold_workspace_bytes(int64_t size, DType dtype);
/// A histogram of the leading 16 bits, the elements of the bin that holds the answer, and again with the next bits.
Status magnitude_threshold_cpu(const Context& context, const ThresholdArgs& args, Threshold* found);

/// out[i] = |x[i]| >= threshold ? x[i] : 0; out may be x.
Status keep_from_cpu(const Context& context, int64_t size, DType dtype, const void* x, uint64_t threshold, void* out);

}  // namespace pylora::select
