// How work is cut, as pure functions of the shape.
#pragma once

#include "common/sizes.h"
#include "lanczos/lanczos.h"

namespace pylora::lanczos {

/// Rows of W are summed in chunks, whose sums are added in order: most chunks, and least rows of one.
constexpr int64_t kMostChunks = 16, kLeastChunkRows = 64;

constexpr int64_t chunk_rows(int64_t rows) {
  const int64_t share = (rows + kMostChunks - 1) / kMostChunks;
  return share < kLeastChunkRows ? kLeastChunkRows : (share + 3) / 4 * 4;
}

constexpr int64_t num_chunks(int64_t rows) { return rows > 0 ? (rows + chunk_rows(rows) - 1) / chunk_rows(rows) : 1; }

/// A gram product's sums are as large as X, so it has fewer chunks: a multiple of its tile each.
constexpr int64_t kGramChunks = 8;

constexpr int64_t gram_chunk_rows(int64_t rows) {
  const int64_t share = (rows + kGramChunks - 1) / kGramChunks;
  return share < kLeastChunkRows ? kLeastChunkRows : (share + 7) / 8 * 8;
}

constexpr int64_t gram_chunks(int64_t rows) {
  return rows > 0 ? (rows + gram_chunk_rows(rows) - 1) / gram_chunk_rows(rows) : 1;
}

/// A vector that keeps this share of its length when V is taken out of it is orthogonal to V but for rounding: less, and
/// V is taken out again (Daniel, Gragg, Kaufman and Stewart, "Reorthogonalization and stable algorithms", 1976).
constexpr double kKeptShare = 0.7;

/// Values below this share of the largest are taken for zero.
constexpr double roundoff(DType dtype) { return dtype == DType::f64 ? 0x1p-51 : 0x1p-22; }

}  // namespace pylora::lanczos
