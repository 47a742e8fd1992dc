// A block's products in shrink, by tensor cores or by FMA: sums [64 rows, 64 ranks] over a part of the width.
#pragma once

#include "cuda/segments.cuh"

namespace pylora::cuda {

/// Shared memory before the tiles: the rows of the item, a flag, and the slot's factors.
constexpr int kShrinkHeader = kItemRows * static_cast<int>(sizeof(int64_t)) + 256;
static_assert(16 + kMaxSlices * sizeof(FactorView) <= 256, "the header has room for the factors");

template <class T>
struct XRows {
  const T* data;
  int64_t stride;
  const int64_t* rows;  // shared, [kItemRows]
  int num_rows;
};

/// Rank n of the tile is rank (first_rank + n) % rank of slice (first_rank + n) / rank.
struct FactorRows {
  const FactorView* views;  // shared, [slices]
  int rank, first_rank, num_ranks;

  PYLORA_DEVICE const FactorView& view(int n) const { return views[(first_rank + n) / rank]; }
  /// Element 0 of the row of rank n < num_ranks.
  PYLORA_DEVICE int64_t offset(int n) const { return view(n).first + (first_rank + n) % rank * view(n).rank_stride; }
};

/// T: bf16 or f16, of x and factors. kVector: 16 bytes at a time. kAcross: the factor's ranks are what lies side by side
/// in memory, and not its columns; one slice.
///
/// A stage in shared memory is x [64 rows][64 columns] and the factor as [ranks][64 columns], or [64 columns][ranks] where
/// kAcross. Rows are 8 elements longer: ldmatrix then finds its rows in different banks.
template <class T, bool kVector, bool kAcross>
class TensorTile {
 public:
  using Element = T;
  using Sum = float;
  static constexpr int kResident = 2;
  static constexpr int kStages = 3, kColumns = kStageColumns, kLine = kColumns + 8;

  static constexpr int stage_elements(int ranks) {
    return (kItemRows + (kAcross ? kColumns : (ranks + 15) / 16 * 16)) * kLine;
  }
  static constexpr int shared_bytes(int ranks) {
    return kShrinkHeader + kStages * stage_elements(ranks) * static_cast<int>(sizeof(T));
  }

  PYLORA_DEVICE TensorTile(const ShrinkArgs& args, int shared_offset) : shared_(shared_memory<T>(shared_offset)) {
    const int ranks = static_cast<int>(args.slots.max_rank) * args.num_slices;
    stage_ = stage_elements(min_of(ranks, kTileRanks));
  }

  PYLORA_DEVICE void multiply(const XRows<T>& x, const FactorRows& f, int64_t begin, int64_t end,
                              const DropoutDraw& draw) {
#pragma unroll
    for (int j = 0; j < kTileRanks / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums_[j][i] = 0;
    point(x, f);
    const int warp_row = warp_id() * 16, groups = (f.num_ranks + 15) / 16;
    const bool has_rows = warp_row < x.num_rows;
    const int64_t row = x.rows[warp_row + lane_id() / 4], row8 = x.rows[warp_row + 8 + lane_id() / 4];
    const int stages = static_cast<int>((end - begin + kColumns - 1) / kColumns);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s)
      fetch(x, f, s, begin + int64_t{s} * kColumns, end);
    for (int s = 0; s < stages; ++s) {
      if (kVector) cp_async_wait<kStages - 2>();
      __syncthreads();  // stage s is there for all, and stage s - 1 has been read
      fetch(x, f, s + kStages - 1, begin + int64_t{s + kStages - 1} * kColumns, end);
      if (!has_rows) continue;
      const T* stage = shared_ + s % kStages * stage_;
      if (draw.active()) {
        multiply_stage<true>(stage, groups, draw, row, row8, begin / kColumns + s);
      } else {
        multiply_stage<false>(stage, groups, draw, row, row8, 0);
      }
    }
    if (kVector) cp_async_wait<0>();
  }

  template <class Body>
  PYLORA_DEVICE void for_each(const Body& body) const {
    const int row = warp_id() * 16 + lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kTileRanks / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        body(row + i / 2 * 8, j * 8 + column + i % 2, sums_[j][i]);
  }

  /// Kept values are scaled in the sums: in the fragments they would be rounded.
  PYLORA_DEVICE float sum_scale(const DropoutDraw& draw) const { return static_cast<float>(draw.keep_scale); }

 private:
  static constexpr int kCopies = 64 * kColumns / 8 / kThreads;

  /// A thread copies the same eight columns of the same rows in every stage.
  PYLORA_DEVICE void point(const XRows<T>& x, const FactorRows& f) {
    const int line = threadIdx.x / 8, column = threadIdx.x % 8 * 8;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int n = line + i * 16;
      x_at_[i] = n < x.num_rows ? x.data + x.rows[n] * x.stride + column : x.data;
      if (kAcross) {
        const FactorView& view = f.views[0];
        f_at_[i] = static_cast<const T*>(view.data) + view.first + f.first_rank + column + n * view.column_stride;
      } else if (n < f.num_ranks) {
        f_at_[i] = static_cast<const T*>(f.view(n).data) + f.offset(n);
        if (!kVector) f_step_[i] = f.view(n).column_stride;
      } else {
        f_at_[i] = x.data;  // not read
      }
    }
  }

  PYLORA_DEVICE void fetch(const XRows<T>& x, const FactorRows& f, int s, int64_t first, int64_t end) {
    const int line = threadIdx.x / 8, column = threadIdx.x % 8 * 8;
    const int left = left_of(end, first);
    T* x_tile = shared_ + s % kStages * stage_;
    T* f_tile = x_tile + kItemRows * kLine;
    if (left > 0) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int n = line + i * 16;
        fetch_eight<T, kVector>(x_tile + n * kLine + column, x_at_[i] + first, n < x.num_rows ? left - column : 0,
                                x.data);
        if (kAcross) {
          const int valid = n < left ? f.num_ranks - column : 0;
          if (column >= (f.num_ranks + 15) / 16 * 16) continue;
          fetch_eight<T, kVector>(f_tile + n * kLine + column, f_at_[i] + first * f.views[0].column_stride, valid,
                                  x.data);
        } else if (n < (f.num_ranks + 15) / 16 * 16) {
          fetch_factor(f_tile + n * kLine + column, i, first + column, n < f.num_ranks ? left - column : 0, x.data);
        }
      }
    }
    if (kVector) cp_async_commit();  // an empty one past the end, so that waiting counts alike
  }

  /// Eight columns of a rank. Without kVector they may lie anywhere.
  PYLORA_DEVICE void fetch_factor(T* to, int i, int64_t column, int valid, const void* base) {
    if constexpr (kVector) {
      // f_at_ is column 0 of the row.
      fetch_eight<T, true>(to, f_at_[i] + column, valid, base);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        to[e] = e < valid ? load_readonly<T>(f_at_[i] + (column + e) * f_step_[i]) : T{0};
    }
  }

  template <bool kDropout>
  PYLORA_DEVICE void multiply_stage(const T* stage, int groups, const DropoutDraw& draw, int64_t row, int64_t row8,
                                    int64_t block) {
    const int lane = lane_id(), t = lane % 4;
    uint32_t kept[4];  // [row or row + 8][column parity]
    if constexpr (kDropout) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        kept[i] = draw.kept(i < 2 ? row : row8, block, 2 * t + i % 2);
    }
    const T* const x_tile = stage + (warp_id() * 16 + lane % 16) * kLine + lane / 16 * 8;
    const T* const f_tile = stage + kItemRows * kLine;
#pragma unroll
    for (int k = 0; k < kColumns; k += 16) {
      uint32_t a[4];
      ldmatrix<4>(a, x_tile + k);
      if constexpr (kDropout) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // a[i]: row i % 2, columns k + 8 (i / 2) + 2 t and the next
          const int v = k / 8 + i / 2;
          const float2 pair = unpack<T>(a[i]);
          // A product, as on the CPU, so that a dropped infinity is a NaN and does not vanish.
          a[i] = pack<T>(pair.x * static_cast<float>(kept[i % 2 * 2] >> v & 1),
                         pair.y * static_cast<float>(kept[i % 2 * 2 + 1] >> v & 1));
        }
      }
#pragma unroll
      for (int j = 0; j < kTileRanks / 16; ++j) {
        if (j >= groups) continue;
        uint32_t b[4];
        const int high = lane / 16 * 8, low = lane / 8 % 2 * 8, line = lane % 8;
        if constexpr (kAcross) {
          ldmatrix_transposed<4>(b, f_tile + (k + low + line) * kLine + j * 16 + high);
        } else {
          ldmatrix<4>(b, f_tile + (j * 16 + high + line) * kLine + k + low);
        }
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        mma_m16n8k16<T>(sums_[2 * j], a, b0);
        mma_m16n8k16<T>(sums_[2 * j + 1], a, b1);
      }
    }
  }

  T* shared_;
  int stage_;
  const T *x_at_[kCopies], *f_at_[kCopies];
  int64_t f_step_[kCopies] = {};
  float sums_[kTileRanks / 8][4];
};

/// Any dtypes. kRanks: 16 or 64, the tile's width. kVector: f32 throughout, read 16 bytes at a time along the width.
template <class T, int kRanks, bool kVector>
class FmaTile {
 public:
  using Element = T;
  using Sum = Accumulator<T>;
  static constexpr int kResident = sizeof(Sum) == 8 ? 3 : 4;
  static constexpr int kDepth = 16, kXLine = kItemRows + 4, kFLine = kRanks + 4;
  static constexpr int kRows = kRanks == 64 ? 8 : 4, kColumns = kRanks == 64 ? 4 : 2;  // of a thread
  static_assert(kItemRows / kRows * (kRanks / kColumns) == kThreads, "a thread for each part of the tile");

  static constexpr int shared_bytes(int) {
    return kShrinkHeader + kItemRows * 8 + kDepth * (kXLine + kFLine) * static_cast<int>(sizeof(Sum));
  }

  PYLORA_DEVICE FmaTile(const ShrinkArgs& args, int shared_offset)
      : factor_dtype_(args.factor_dtype),
        kept_(shared_memory<unsigned char>(shared_offset)),
        x_tile_(shared_memory<Sum>(shared_offset + kItemRows * 8)),
        f_tile_(x_tile_ + kDepth * kXLine) {}

  PYLORA_DEVICE void multiply(const XRows<T>& x, const FactorRows& f, int64_t begin, int64_t end,
                              const DropoutDraw& draw) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        sums_[r][c] = 0;
    for (int64_t first = begin; first < end; first += kDepth) {
      if (draw.active() && first % kDropoutBlock == 0) {
        __syncthreads();  // the block before has been read
        draw_block(draw, x.rows, x.num_rows, first / kDropoutBlock, kept_);
      }
      __syncthreads();  // the tiles have been read, and kept_ is there
      const int left = left_of(end, first);
      load_x(x, first, left, draw);
      load_factor(f, first, left);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
        multiply_depth(k);
    }
  }

  template <class Body>
  PYLORA_DEVICE void for_each(const Body& body) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        body(row() + r, column() + c, sums_[r][c]);
  }

  PYLORA_DEVICE Sum sum_scale(const DropoutDraw&) const { return 1; }

 private:
  PYLORA_DEVICE int row() const { return threadIdx.x / (kRanks / kColumns) * kRows; }
  PYLORA_DEVICE int column() const { return threadIdx.x % (kRanks / kColumns) * kColumns; }

  PYLORA_DEVICE void load_x(const XRows<T>& x, int64_t first, int left, const DropoutDraw& draw) {
    constexpr int kStep = kVector ? 4 : 1;
    for (int i = threadIdx.x; i < kItemRows * (kDepth / kStep); i += kThreads) {
      const int r = i / (kDepth / kStep), k = i % (kDepth / kStep) * kStep;
      Sum values[kStep] = {};
      if (r < x.num_rows && k < left) {
        const T* p = x.data + x.rows[r] * x.stride + first + k;
        if constexpr (kVector) {
          const float4 four = load_readonly<float4>(p);
          values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
        } else {
          values[0] = widen(load_readonly<T>(p));
        }
        if (draw.active()) {
#pragma unroll
          for (int e = 0; e < kStep; ++e)
            values[e] *= is_kept(kept_, r, static_cast<int>((first + k + e) % kDropoutBlock))
                             ? static_cast<Sum>(draw.keep_scale)
                             : Sum(0);
        }
      }
#pragma unroll
      for (int e = 0; e < kStep; ++e)
        x_tile_[(k + e) * kXLine + r] = values[e];
    }
  }

  PYLORA_DEVICE void load_factor(const FactorRows& f, int64_t first, int left) {
    constexpr int kStep = kVector ? 4 : 1;
    for (int i = threadIdx.x; i < kRanks * (kDepth / kStep); i += kThreads) {
      const int n = i / (kDepth / kStep), k = i % (kDepth / kStep) * kStep;
      Sum values[kStep] = {};
      if (n < f.num_ranks && k < left) {
        const FactorView& factor = f.view(n);
        const int64_t offset = f.offset(n);
        if constexpr (kVector) {
          const float4 four = load_readonly<float4>(static_cast<const float*>(factor.data) + offset + first + k);
          values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
        } else {
          values[0] = load_element<Sum>(factor.data, factor_dtype_, offset + (first + k) * factor.column_stride);
        }
      }
#pragma unroll
      for (int e = 0; e < kStep; ++e)
        f_tile_[(k + e) * kFLine + n] = values[e];
    }
  }

  PYLORA_DEVICE void multiply_depth(int k) {
    Sum a[kRows], b[kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      a[r] = x_tile_[k * kXLine + row() + r];
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      b[c] = f_tile_[k * kFLine + column() + c];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        sums_[r][c] += a[r] * b[c];
  }

  DType factor_dtype_;
  unsigned char* kept_;
  Sum *x_tile_, *f_tile_;
  Sum sums_[kRows][kColumns];
};

}  // namespace pylora::cuda
