// The sums D of a tile of W in registers, by FMA or by tensor cores, from packed factors.
#pragma once

#include "cuda/segments.cuh"
#include "merge/packed.cuh"
#include "merge/rounding.cuh"

namespace pylora::merge {

/// Lines `first` .. `first + valid` of one matrix's side, `Width` features from `feature` on, into `Depth` lines of shared
/// memory; lines from `valid` on are zeros.
template <class P, int Depth, int Width, int Line>
PYLORA_DEVICE void fetch_lines(P* shared, const void* side, int64_t line, int64_t first, int valid, int64_t feature,
                               int depth = Depth) {
  constexpr int kOnce = 16 / static_cast<int>(sizeof(P)), kPieces = Width / kOnce;
  const P* const from = static_cast<const P*>(side) + first * line + feature;
  for (int i = threadIdx.x; i < depth * kPieces; i += cuda::kThreads) {
    const int k = i / kPieces, c = i % kPieces * kOnce;
    cuda::cp_async<16>(shared + k * Line + c, k < valid ? from + k * line + c : static_cast<const P*>(side),
                       k < valid ? 16 : 0);
  }
}

/// Ranks in order, each one fused multiply-add: the CPU's bits. A thread has 4 rows, and in each 4 columns twice.
template <class Element>
class FmaSums {
 public:
  using T = Element;
  using C = Accumulator<T>;
  static constexpr bool kTensorCores = false;
  static constexpr int kRows = 32, kRun = 4, kResident = sizeof(C) == 8 ? 2 : 4;
  static constexpr int kDepth = 16, kWidth = static_cast<int>(kTileColumns);
  static constexpr int kFactorBytes = kDepth * (kRows + kWidth) * static_cast<int>(sizeof(C));

  PYLORA_DEVICE void add_up(const PackedFactors& f, int64_t matrix, int64_t row, int64_t column, void* factors) {
    C* const left = static_cast<C*>(factors);
    C* const right = left + kDepth * kRows;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 8; ++c)
        sums_[r][c] = 0;
    for (int64_t first = 0; first < f.rank; first += kDepth) {
      const int valid = cuda::min_of(kDepth, cuda::left_of(f.rank, first));
      __syncthreads();  // what lay there has been read
      fetch_lines<C, kDepth, kRows, kRows>(left, f.left.data, f.left.line, matrix * f.rank + first, valid, row);
      fetch_lines<C, kDepth, kWidth, kWidth>(right, f.right.data, f.right.line, matrix * f.rank + first, valid, column);
      cuda::cp_async_commit();
      cuda::cp_async_wait<0>();
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
        if (k < valid) add_rank(left + k * kRows, right + k * kWidth);  // 0 * 0 would make +0 of a sum that is -0
    }
  }

  /// body(row, column, sums of kRun neighbouring columns).
  template <class Body>
  PYLORA_DEVICE void for_each(const Body& body) const {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const C run[kRun] = {sums_[r][4 * h], sums_[r][4 * h + 1], sums_[r][4 * h + 2], sums_[r][4 * h + 3]};
        body(row() + r, column() + 64 * h, run);
      }
  }

 private:
  struct alignas(16) Quad {
    C element[4];
  };

  PYLORA_DEVICE int row() const { return static_cast<int>(threadIdx.x) / 16 * 4; }
  PYLORA_DEVICE int column() const { return static_cast<int>(threadIdx.x) % 16 * 4; }

  PYLORA_DEVICE void add_rank(const C* left, const C* right) {
    const Quad l = *reinterpret_cast<const Quad*>(left + row());
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Quad columns = *reinterpret_cast<const Quad*>(right + column() + 64 * h);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          sums_[r][4 * h + c] = multiply_add_rn(l.element[r], columns.element[c], sums_[r][4 * h + c]);
    }
  }

  C sums_[4][8];
};

/// bf16 products, exact, and f32 sums in sixteens of ranks: high high, then high low, then low high. A warp has 16 rows.
template <class Element>
class TensorSums {
 public:
  using T = Element;
  using C = float;
  static constexpr bool kTensorCores = true;
  static constexpr int kRows = 64, kRun = 2, kResident = 3;
  static constexpr int kDepth = 32, kWidth = static_cast<int>(kTileColumns);
  static constexpr int kLeftLine = kRows + 8, kRightLine = kWidth + 8;  // ldmatrix finds its rows in different banks
  static constexpr int kLeft = kDepth * kLeftLine, kRight = kDepth * kRightLine;
  static constexpr int kFactorBytes = 2 * (kLeft + kRight) * 2;

  PYLORA_DEVICE void add_up(const PackedFactors& f, int64_t matrix, int64_t row, int64_t column, void* factors) {
    bf16* const left = static_cast<bf16*>(factors);
    bf16* const right = left + 2 * kLeft;
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums_[j][i] = 0;
    for (int64_t first = 0; first < f.rank; first += kDepth) {
      const int valid = cuda::min_of(kDepth, cuda::left_of(f.rank, first)), depth = (valid + 15) / 16 * 16;
      __syncthreads();  // what lay there has been read
      fetch(left, right, f, matrix * f.rank + first, valid, row, column, depth);
      cuda::cp_async_commit();
      cuda::cp_async_wait<0>();
      __syncthreads();
#pragma unroll 1
      for (int k = 0; k < depth; k += 16)
        add_ranks(left + k * kLeftLine, right + k * kRightLine, f.left.low, f.right.low);
    }
  }

  template <class Body>
  PYLORA_DEVICE void for_each(const Body& body) const {
    const int row = warp() * 16 + cuda::lane_id() / 4, column = cuda::lane_id() % 4 * 2;
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const C run[kRun] = {sums_[j][2 * h], sums_[j][2 * h + 1]};
        body(row + 8 * h, j * 8 + column, run);
      }
  }

 private:
  static PYLORA_DEVICE int warp() { return cuda::warp_id(); }

  static PYLORA_DEVICE void fetch(bf16* left, bf16* right, const PackedFactors& f, int64_t first, int valid,
                                  int64_t row, int64_t column, int depth) {
    fetch_lines<bf16, kDepth, kRows, kLeftLine>(left, f.left.data, f.left.line, first, valid, row, depth);
    fetch_lines<bf16, kDepth, kWidth, kRightLine>(right, f.right.data, f.right.line, first, valid, column, depth);
    if (f.left.low)
      fetch_lines<bf16, kDepth, kRows, kLeftLine>(left + kLeft, f.left.low, f.left.line, first, valid, row, depth);
    if (f.right.low)
      fetch_lines<bf16, kDepth, kWidth, kRightLine>(right + kRight, f.right.low, f.right.line, first, valid, column,
                                                    depth);
  }

  PYLORA_DEVICE void add_ranks(const bf16* left, const bf16* right, bool has_low_left, bool has_low_right) {
    const int lane = cuda::lane_id(), line = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const bf16* const left_row = left + (high + line) * kLeftLine + warp() * 16 + low;
    uint32_t a[4], a_low[4] = {};
    cuda::ldmatrix_transposed<4>(a, left_row);
    if (has_low_left) cuda::ldmatrix_transposed<4>(a_low, left_row + kLeft);
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      const bf16* const right_row = right + (low + line) * kRightLine + j * 8 + high;
      uint32_t b[4];
      cuda::ldmatrix_transposed<4>(b, right_row);
      multiply(j, a, b);
      if (has_low_right) {
        uint32_t b_low[4];
        cuda::ldmatrix_transposed<4>(b_low, right_row + kRight);
        multiply(j, a, b_low);
      }
      if (has_low_left) multiply(j, a_low, b);
    }
  }

  PYLORA_DEVICE void multiply(int j, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
    cuda::mma_m16n8k16<bf16>(sums_[j], a, b0);
    cuda::mma_m16n8k16<bf16>(sums_[j + 1], a, b1);
  }

  float sums_[16][4];
};

}  // namespace pylora::merge
