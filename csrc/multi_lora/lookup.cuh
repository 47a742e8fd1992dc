// An embedding's products with A: a look-up in the forward, a sum by column in the backward.
#pragma once

#include "cuda/segments.cuh"

namespace pylora::multi_lora {

/// What both kernels are given. columns: [rows], of A; those that A does not have are passed over.
struct LookupWork {
  cuda::Plan plan;
  cuda::Slots slots;
  DType factor_dtype = DType::f32;
  cuda::Factor a;
  const void* da = nullptr;  // the Place of slot 0's gradient, as in cuda::Factor
  const int64_t* columns = nullptr;
  int64_t num_columns = 0, frozen_column = -1;
  void* v = nullptr;  // in scatter g, which is read
  int64_t v_stride = 0;
};

/// v[t] = a_s[:, columns[t]] of an item's rows; 0 where there is no such column.
template <class C>
__global__ void __launch_bounds__(cuda::kThreads) lookup_kernel(const LookupWork work) {
  cuda::for_each_piece(cuda::num_items(work.plan), [&](int64_t index) {
    const cuda::Item item = cuda::item_at(work.plan, index);
    const cuda::FactorView a = cuda::view_of(work.a, item.slot);
    const int rank = cuda::rank_of(work.slots, item.slot);
    for (int i = threadIdx.x; i < item.rows * rank; i += cuda::kThreads) {
      const int64_t row = cuda::row_at(work.plan, item, i / rank), k = i % rank;
      const int64_t column = cuda::load_readonly<int64_t>(work.columns + row);
      C value = 0;
      if (column >= 0 && column < work.num_columns)
        value =
            cuda::load_element<C>(a.data, work.factor_dtype, a.first + k * a.rank_stride + column * a.column_stride);
      cuda::store_global(static_cast<C*>(work.v) + row * work.v_stride + k, value);
    }
  });
}

/// Rows of an item that a block's warps take at once.
constexpr int kRowsAtOnce = cuda::kWarps;
/// Blocks a multiprocessor: left to itself ptxas aims at 16 on sm_100, and spills.
constexpr int kScatterBlocks = 12;

/// da_s[:, c] = sum of g[t] over the tokens of slot s with column c, in the order of the plan. A warp takes a token; where
/// that is the first of its column, it sums over all of them, and nobody else writes this column. Columns of no token are
/// not written. Looks at each pair of tokens of a slot: cheap beside dY as long as a slot has some thousand.
template <class C>
__global__ void __launch_bounds__(cuda::kThreads, kScatterBlocks) scatter_kernel(const LookupWork work) {
  const int64_t count = cuda::num_items(work.plan);
  constexpr int kParts = cuda::kItemRows / kRowsAtOnce;
  const int lane = cuda::lane_id();
  cuda::for_each_piece(count * kParts, [&](int64_t piece) {
    const int64_t index = piece / kParts;
    const cuda::Item item = cuda::item_at(work.plan, index);
    const int own = static_cast<int>(piece % kParts) * kRowsAtOnce + cuda::warp_id();
    if (own >= item.rows) return;
    const int64_t column = cuda::load_readonly<int64_t>(work.columns + cuda::row_at(work.plan, item, own));
    if (column < 0 || column >= work.num_columns || column == work.frozen_column) return;
    const cuda::Place<void*> da = cuda::place_of<void*>(work.da, item.slot);
    const int rank = cuda::rank_of(work.slots, item.slot);
    for (int first_rank = 0; first_rank < rank; first_rank += cuda::kWarpSize) {
      const int k = first_rank + lane;
      C sum = 0;
      for (int64_t j = 0; j < count; ++j) {
        const cuda::Item other = cuda::item_at(work.plan, j);
        if (other.slot != item.slot) continue;
        for (int first = 0; first < other.rows; first += cuda::kWarpSize) {
          const int r = first + lane;
          const bool same = r < other.rows &&
                            cuda::load_readonly<int64_t>(work.columns + cuda::row_at(work.plan, other, r)) == column;
          unsigned found = __ballot_sync(cuda::kAllLanes, same);
          if (found && (j < index || (j == index && first + __ffs(static_cast<int>(found)) - 1 < own))) return;
          for (; found; found &= found - 1) {
            const int64_t row = cuda::row_at(work.plan, other, first + __ffs(static_cast<int>(found)) - 1);
            if (k < rank) sum += cuda::load_readonly<C>(static_cast<const C*>(work.v) + row * work.v_stride + k);
          }
        }
      }
      if (k < rank)
        cuda::store_element<C>(da.data, work.factor_dtype, k * da.rank_stride + column * da.column_stride, sum);
    }
  });
}

}  // namespace pylora::multi_lora
