// A block's part of DoRA's norms, by tensor cores or by FMA: sums of squares of the rows of W + scaling * B A, and of W. The
// products of the rank are added to W in registers, and no matrix of W's size is stored.
#pragma once

#include "cuda/quads.cuh"
#include "cuda/segments.cuh"
#include "dora/heuristics.h"

namespace pylora::dora {

using cuda::kThreads;
using cuda::kWarpSize;
using cuda::lane_id;
using cuda::min_of;
using cuda::warp_id;

/// Shared memory before the tiles: a flag, and the two sums of each row.
constexpr int kNormsHeader = 128 + static_cast<int>(kNormRows) * 16;

/// Rows of W that a block works on.
struct RowBlock {
  int64_t first;
  int num_rows;
};

/// bf16 or f16 throughout, A and W moved 16 bytes at a time. Products of factors are exact, sums f32.
///
/// In shared memory: B as [64 rows][ranks], A as [ranks][128 columns]. Rows are 8 elements longer, so that ldmatrix finds
/// its rows in different banks.
template <class T>
class TensorTile {
 public:
  static constexpr int kResident = 3;
  static constexpr int kColumns = kNormColumns, kDepth = 64, kBLine = kDepth + 8, kALine = kColumns + 8;
  static constexpr int kSharedBytes =
      kNormsHeader + (static_cast<int>(kNormRows) * kBLine + kDepth * kALine) * static_cast<int>(sizeof(T));

  PYLORA_DEVICE void add_columns(const NormsArgs& args, const RowBlock& rows, int64_t column, bool is_first) {
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums_[j][i] = 0;
    T* const b_tile = cuda::shared_memory<T>(kNormsHeader);
    T* const a_tile = b_tile + kNormRows * kBLine;
    const int rank = static_cast<int>(args.rank), num_columns = cuda::left_of(args.in_features, column);
    for (int first = 0; first < rank; first += kDepth) {
      const int left = min_of(kDepth, rank - first), depth = (left + 15) / 16 * 16;
      __syncthreads();  // the ranks before have been read
      fetch_a(a_tile, args, first, left, depth, column, num_columns);
      if (is_first || rank > kDepth) load_b(b_tile, args, rows, first, left, depth);
      cuda::cp_async_wait<0>();
      __syncthreads();
#pragma unroll 1
      for (int k = 0; k < depth; k += 16)
        multiply_ranks(b_tile, a_tile, k);
    }
    add_squares(args, rows, column, num_columns);
  }

  /// body(row, 0, sum of W + scaling * B A), body(row, 1, sum of W), by one lane a row.
  template <class Body>
  PYLORA_DEVICE void for_each(const Body& body) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        double sum = squares_[h][i];
        sum += __shfl_xor_sync(cuda::kAllLanes, sum, 1);
        sum += __shfl_xor_sync(cuda::kAllLanes, sum, 2);
        if (lane_id() % 4 == 0) body(warp_id() * 16 + h * 8 + lane_id() / 4, i, sum);
      }
  }

 private:
  PYLORA_DEVICE void fetch_a(T* a_tile, const NormsArgs& args, int first, int left, int depth, int64_t column,
                             int num_columns) {
    const T* const a = static_cast<const T*>(args.a.data) + column;
    for (int i = threadIdx.x; i < depth * (kColumns / 8); i += kThreads) {
      const int r = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
      cuda::fetch_eight<T, true>(a_tile + r * kALine + c, a + (first + r) * args.a.row_stride + c,
                                 r < left ? num_columns - c : 0, args.a.data);
    }
    cuda::cp_async_commit();
  }

  PYLORA_DEVICE void load_b(T* b_tile, const NormsArgs& args, const RowBlock& rows, int first, int left, int depth) {
    for (int i = threadIdx.x; i < kNormRows * depth; i += kThreads) {
      const int r = i / depth, k = i % depth;
      const T* const b = static_cast<const T*>(args.b.data) + (rows.first + r) * args.b.row_stride;
      b_tile[r * kBLine + k] =
          r < rows.num_rows && k < left ? cuda::load_readonly<T>(b + (first + k) * args.b.column_stride) : T{0};
    }
  }

  PYLORA_DEVICE void multiply_ranks(const T* b_tile, const T* a_tile, int k) {
    const int lane = lane_id(), high = lane / 16 * 8, low = lane / 8 % 2 * 8, line = lane % 8;
    uint32_t b[4];
    cuda::ldmatrix<4>(b, b_tile + (warp_id() * 16 + lane % 16) * kBLine + k + high);
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      uint32_t a[4];
      cuda::ldmatrix_transposed<4>(a, a_tile + (k + low + line) * kALine + j * 8 + high);
      const uint32_t a0[2] = {a[0], a[1]}, a1[2] = {a[2], a[3]};
      cuda::mma_m16n8k16<T>(sums_[j], b, a0);
      cuda::mma_m16n8k16<T>(sums_[j + 1], b, a1);
    }
  }

  PYLORA_DEVICE void add_squares(const NormsArgs& args, const RowBlock& rows, int64_t column, int num_columns) {
    const int t = lane_id() % 4;
    const float scaling = static_cast<float>(args.scaling);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = warp_id() * 16 + h * 8 + lane_id() / 4;
      const bool inside = r < rows.num_rows;
      const T* const w = static_cast<const T*>(args.weight.data) +
                         (inside ? (rows.first + r) * args.weight.row_stride + column + t * 8 : 0);
      float square = 0, own = 0;
#pragma unroll
      for (int q = 0; q < 4; ++q) {  // four tiles of eight columns: this lane gets tile 4 q + t
        const uint4 eight = cuda::load_eight<T, true>(w + q * 32, inside ? num_columns - t * 8 - q * 32 : 0);
        float pairs[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          pairs[j][0] = sums_[4 * q + j][2 * h], pairs[j][1] = sums_[4 * q + j][2 * h + 1];
        cuda::transpose_quad(pairs, t);
        const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 pair = cuda::unpack<T>(words[j]);
          const float x = pair.x + scaling * pairs[j][0], y = pair.y + scaling * pairs[j][1];
          square += x * x + y * y;
          own += pair.x * pair.x + pair.y * pair.y;
        }
      }
      squares_[h][0] += square;
      squares_[h][1] += own;
    }
  }

  float sums_[16][4];
  double squares_[2][2] = {};
};

/// Any dtypes and strides. C: the accumulator of W.
template <class C>
class FmaTile {
 public:
  static constexpr int kResident = sizeof(C) == 8 ? 2 : 3;  // with one more, ptxas spills
  static constexpr int kColumns = 64, kDepth = 16, kBLine = static_cast<int>(kNormRows) + 4, kALine = kColumns + 4;
  static constexpr int kRows = 8, kWide = 4;  // of a thread
  static constexpr int kSharedBytes = kNormsHeader + kDepth * (kBLine + kALine) * static_cast<int>(sizeof(C));

  PYLORA_DEVICE void add_columns(const NormsArgs& args, const RowBlock& rows, int64_t column, bool) {
    C* const b_tile = cuda::shared_memory<C>(kNormsHeader);
    C* const a_tile = b_tile + kDepth * kBLine;
    const int num_columns = min_of(kColumns, cuda::left_of(args.in_features, column));
    C sums[kRows][kWide] = {};
    for (int64_t first = 0; first < args.rank; first += kDepth) {
      __syncthreads();  // the ranks before have been read
      load_tiles(b_tile, a_tile, args, rows, first, column, num_columns);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int c = 0; c < kWide; ++c)
            sums[r][c] += b_tile[k * kBLine + row() + r] * a_tile[k * kALine + wide() + c];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      C square = 0, own = 0;
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        const bool inside = row() + r < rows.num_rows && wide() + c < num_columns;
        const int64_t index =
            (rows.first + row() + r) * args.weight.row_stride + (column + wide() + c) * args.weight.column_stride;
        const C w = inside ? cuda::load_element<C>(args.weight.data, args.dtype, index) : C(0);
        const C element = w + static_cast<C>(args.scaling) * sums[r][c];
        square += element * element;
        own += w * w;
      }
      squares_[r][0] += square;
      squares_[r][1] += own;
    }
  }

  template <class Body>
  PYLORA_DEVICE void for_each(const Body& body) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        double sum = squares_[r][i];
#pragma unroll
        for (int step = 1; step < kColumns / kWide; step *= 2)
          sum += __shfl_xor_sync(cuda::kAllLanes, sum, step);
        if (threadIdx.x % (kColumns / kWide) == 0) body(row() + r, i, sum);
      }
  }

 private:
  PYLORA_DEVICE int row() const { return threadIdx.x / (kColumns / kWide) * kRows; }
  PYLORA_DEVICE int wide() const { return threadIdx.x % (kColumns / kWide) * kWide; }

  PYLORA_DEVICE void load_tiles(C* b_tile, C* a_tile, const NormsArgs& args, const RowBlock& rows, int64_t first,
                                int64_t column, int num_columns) {
    const int left = cuda::left_of(args.rank, first);
    for (int i = threadIdx.x; i < kNormRows * kDepth; i += kThreads) {
      const int r = i / kDepth, k = i % kDepth;
      const int64_t index = (rows.first + r) * args.b.row_stride + (first + k) * args.b.column_stride;
      b_tile[k * kBLine + r] =
          r < rows.num_rows && k < left ? cuda::load_element<C>(args.b.data, args.factor_dtype, index) : C(0);
    }
    for (int i = threadIdx.x; i < kDepth * kColumns; i += kThreads) {
      const int k = i / kColumns, c = i % kColumns;
      const int64_t index = (first + k) * args.a.row_stride + (column + c) * args.a.column_stride;
      a_tile[k * kALine + c] =
          k < left && c < num_columns ? cuda::load_element<C>(args.a.data, args.factor_dtype, index) : C(0);
    }
  }

  double squares_[kRows][2] = {};
};

}  // namespace pylora::dora
