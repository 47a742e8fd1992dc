// How work is cut, as pure functions of the shape.
#pragma once

#include "lanczos/lanczos.h"

namespace pylora::lanczos {

/// Rows of W are summed in chunks, whose sums are added in order: most chunks, and least rows of one.
constexpr int64_t kMostChunks = 16, kLeastChunkRows = 64;

constexpr int64_t chunk_rows(int64_t rows) {
  const int64_t share = (rows + kMostChunks - 1) / kMostChunks;
  return share < kLeastChunkRows ? kLeastChunkRows : (share + 3) / 4 * 4;
}

constexpr int64_t num_chunks(int64_t rows) { return rows > 0 ? (rows + chunk_rows(rows) - 1) / chunk_rows(rows) : 1; }

/// Values below this share of the largest are taken for zero.
constexpr double roundoff(DType dtype) { return dtype == DType::f64 ? 0x1p-51 : 0x1p-22; }

/// Least work of a thread, in elements of W or V: waking one costs about 5 us, in which one reads 50,000 numbers.
constexpr int64_t kGrainWork = 50000;

constexpr int64_t grain(int64_t work_per_item) { return work_per_item > 0 ? 1 + kGrainWork / work_per_item : 1; }

}  // namespace pylora::lanczos
