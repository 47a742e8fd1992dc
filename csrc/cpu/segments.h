// Low-rank products of many adapters in one call, on the CPU: what sgmv, bgmv and multi_lora are built on. Tokens that
// share an adapter form a segment; an adapter is a slot.
//
// For each token t of a segment with slot s >= 0 (a slot of -1: the segment's tokens are not touched):
//   v[t]  = drop(x[t]) a_s^T                                   shrink, rank_s numbers
//   y[t] += scaling_s * v[t] b_s^T                             expand
// and, with g[t] = scaling_s * dy[t] b_s, the gradients
//   dx[t] += drop(g[t] a_s),   da_s = sum of g[t]^T drop(x[t]),   db_s = scaling_s * sum of dy[t]^T v[t]
//
// Every slot has its own rank and factor dtype: no product is padded to a common rank.
//
// Numerics. Products are summed in f32 (f64 for f64 activations), whatever the factors' dtypes. y and dx are read, added
// to and rounded once (once for each 512 ranks beyond 512). Products with a one-hot x are exact. A row of v, y and dx depends on that row and its slot
// alone: it has the same bits in any batch, order of rows and number of threads. Sums over tokens (da, db) run in the
// order of the segments. Instruction sets differ in the last bits.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/matrix.h"
#include "common/philox.h"
#include "common/status.h"

namespace pylora {

/// One adapter.
struct SegmentSlot {
  ConstMatrix a;     // [rank, in_features], any strides
  ConstMatrix b;     // [out_features, rank], any strides
  int64_t rank = 0;  // 0: nothing to add
  double scaling = 1;
  DType dtype = DType::f32;  // of a and b
  Dropout dropout;           // on x; counters are those of the token's row in x
};

/// Which token belongs to which slot. A row of the batch is `tokens_per_row` neighbouring tokens (a sequence), so that
/// one plan serves any length.
struct SegmentPlan {
  int64_t num_segments = 0;
  int64_t tokens_per_row = 1;
  const int32_t* order = nullptr;   // [rows]: rows sorted by segment; null: they are already
  const int32_t* indptr = nullptr;  // [num_segments + 1], rows, from 0
  const int32_t* slots = nullptr;   // [num_segments]
  bool on_device = false;           // all in the memory of a CUDA device; indptr null: slots has one for each row

  /// Position p counts tokens segment by segment.
  int64_t token(int64_t p) const {
    if (!order) return p;
    return tokens_per_row == 1 ? order[p] : order[p / tokens_per_row] * tokens_per_row + p % tokens_per_row;
  }
  int64_t begin_of(int64_t segment) const { return indptr[segment] * tokens_per_row; }
  int64_t num_positions() const { return begin_of(num_segments); }
};

struct SegmentShape {
  int64_t in_features = 0;
  int64_t out_features = 0;
  int64_t v_stride = 0;      // of a row of v, at least the largest rank
  DType dtype = DType::f32;  // of x, y, dx, dy
};

/// x of an embedding: row t is 1 at columns[t] and 0 elsewhere, so that x a_s^T is a column of a_s.
struct OneHot {
  const int64_t* columns = nullptr;  // [num_tokens], from 0 to in_features - 1 for tokens with a slot; null: x is dense
  int64_t frozen_column = -1;        // da is 0 there
};

struct SegmentForward {
  SegmentShape shape;
  SegmentPlan plan;
  const SegmentSlot* slots = nullptr;
  ConstMatrix x;      // [num_tokens, in_features], column stride 1
  OneHot one_hot;     // instead of x
  MutableMatrix y;    // [num_tokens, out_features], column stride 1
  void* v = nullptr;  // [num_tokens, v_stride], accumulators; only the first rank numbers of a token are used
};

struct SegmentBackward {
  SegmentShape shape;
  SegmentPlan plan;
  const SegmentSlot* slots = nullptr;
  ConstMatrix dy;           // [num_tokens, out_features], column stride 1
  ConstMatrix x;            // read for da alone
  OneHot one_hot;           // instead of x; dx is then not wanted
  const void* v = nullptr;  // the forward's; read for db alone
  MutableMatrix dx;         // is added to; null: not wanted
  void* g = nullptr;        // scratch, [num_tokens, v_stride] accumulators
  // For each slot, sums that are added to, contiguous accumulators: [rank, in_features] and, transposed,
  // [rank, out_features]. A null array, or a null entry: not wanted.
  void* const* da = nullptr;
  void* const* db = nullptr;
};

/// v alone: y is not read.
Status segments_shrink_cpu(const Context& context, const SegmentForward& args);
/// y alone: x is not read.
Status segments_expand_cpu(const Context& context, const SegmentForward& args);
Status segments_forward_cpu(const Context& context, const SegmentForward& args);
Status segments_backward_cpu(const Context& context, const SegmentBackward& args);

}  // namespace pylora
