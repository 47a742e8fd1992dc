// A block's products in outer, by tensor cores or by FMA.
#pragma once

#include "cuda/segments.cuh"

namespace pylora::cuda {

constexpr int kOuterHeader = 128;

/// g and x from the tile's first rank and column on.
template <class T, class C>
struct OuterItem {
  const C* g;
  int64_t g_stride;
  const T* x;
  int64_t x_stride;
  int num_ranks, num_columns;  // in the tile
  int64_t column;              // the first, for dropout
};

/// T: bf16 or f16, of x. kVector: 16 bytes at a time.
///
/// In shared memory, as bf16 parts: g [64 rows][64 ranks], in two, and x [64 rows][128 columns], f16 in two. Both are read
/// transposed, so that rows are what is summed over. A warp has all ranks by 32 columns.
template <class T, bool kVector>
class TensorTile {
 public:
  using Element = T;
  using Sum = float;
  static constexpr int kColumns = kOuterColumns, kParts = std::is_same_v<T, bf16> ? 1 : 2;
  static constexpr int kResident = kParts == 1 ? 3 : 2;  // with three, ptxas spills for f16 on sm_100
  static constexpr int kGLine = kOuterRanks + 8, kXLine = kColumns + 8;
  static constexpr int kGPart = kItemRows * kGLine, kXPart = kItemRows * kXLine;
  static constexpr int kRowsBytes = kItemRows * static_cast<int>(sizeof(int64_t));
  static constexpr int kKeptBytes = kItemRows * 8 * (kColumns / 64);
  static constexpr int kSharedBytes =
      kOuterHeader + kRowsBytes + kKeptBytes + (2 * kGPart + kParts * kXPart) * static_cast<int>(sizeof(bf16));

  PYLORA_DEVICE void clear() {
    rows_ = shared_memory<int64_t>(kOuterHeader);
    kept_ = shared_memory<unsigned char>(kOuterHeader + kRowsBytes);
    g_tile_ = shared_memory<bf16>(kOuterHeader + kRowsBytes + kKeptBytes);
    x_tile_ = g_tile_ + 2 * kGPart;
#pragma unroll
    for (int m = 0; m < kOuterRanks / 16; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums_[m][n][i] = 0;
  }

  PYLORA_DEVICE void add(const Plan& plan, const Item& item, const OuterItem<T, float>& of, const DropoutDraw& draw) {
    __syncthreads();  // the item before has been read
    for (int r = threadIdx.x; r < item.rows; r += kThreads)
      rows_[r] = row_at(plan, item, r);
    __syncthreads();
    const int depth = (item.rows + 15) / 16 * 16;
    fetch_x(of, item.rows, depth);
    load_g(of, item.rows, depth);
    if (draw.active())
      for (int block = 0; block < kColumns / 64; ++block)
        draw_block(draw, rows_, item.rows, of.column / 64 + block, kept_ + block * kItemRows * 8);
    if (kCopies) cp_async_wait<0>();
    __syncthreads();
    const int groups = (of.num_ranks + 15) / 16;
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      if (draw.active()) {
        multiply_rows<true>(k, groups, item.rows);
      } else {
        multiply_rows<false>(k, groups, item.rows);
      }
    }
  }

  template <class Body>
  PYLORA_DEVICE void for_each(const Body& body) const {
    const int rank = lane_id() / 4, column = warp_id() * 32 + lane_id() % 4 * 2;
#pragma unroll
    for (int m = 0; m < kOuterRanks / 16; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          body(m * 16 + rank + i / 2 * 8, column + n * 8 + i % 2, sums_[m][n][i]);
  }

  PYLORA_DEVICE float sum_scale(const DropoutDraw& draw) const { return static_cast<float>(draw.keep_scale); }

 private:
  static constexpr bool kCopies = kVector && kParts == 1;

  PYLORA_DEVICE void fetch_x(const OuterItem<T, float>& of, int num_rows, int depth) {
    for (int i = threadIdx.x; i < depth * (kColumns / 8); i += kThreads) {
      const int r = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
      const int valid = r < num_rows ? of.num_columns - c : 0;
      const T* p = of.x + (r < num_rows ? rows_[r] * of.x_stride + c : 0);
      bf16* to = x_tile_ + r * kXLine + c;
      if constexpr (kCopies) {
        fetch_eight<bf16, true>(to, p, valid, of.x);
      } else {
        const uint4 eight = load_eight<T, kVector>(p, valid);
        const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 pair = unpack<T>(words[e]);
          *reinterpret_cast<uint32_t*>(to + 2 * e) = pack<bf16>(pair.x, pair.y);
          if (kParts == 2)
            *reinterpret_cast<uint32_t*>(to + kXPart + 2 * e) = pack<bf16>(residual(pair.x), residual(pair.y));
        }
      }
    }
    if (kCopies) cp_async_commit();
  }

  PYLORA_DEVICE void load_g(const OuterItem<T, float>& of, int num_rows, int depth) {
    const int pairs = (of.num_ranks + 15) / 16 * 8;
    for (int i = threadIdx.x; i < depth * pairs; i += kThreads) {
      const int r = i / pairs, k = i % pairs * 2;
      float pair[2] = {0, 0};
      if (r < num_rows) {
        const float* p = of.g + rows_[r] * of.g_stride + k;
        if (k < of.num_ranks) pair[0] = load_readonly<float>(p);
        if (k + 1 < of.num_ranks) pair[1] = load_readonly<float>(p + 1);
      }
      bf16* to = g_tile_ + r * kGLine + k;
      *reinterpret_cast<uint32_t*>(to) = pack<bf16>(pair[0], pair[1]);
      *reinterpret_cast<uint32_t*>(to + kGPart) = pack<bf16>(residual(pair[0]), residual(pair[1]));
    }
  }

  template <bool kDropout>
  PYLORA_DEVICE void multiply_rows(int k, int groups, int num_rows) {
    const int lane = lane_id(), high = lane / 16 * 8, low = lane / 8 % 2 * 8, line = lane % 8;
    uint32_t b[kParts][4][2];  // x: four tiles of eight columns
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t words[4];
        ldmatrix_transposed<4>(words,
                               x_tile_ + part * kXPart + (k + low + line) * kXLine + warp_id() * 32 + n * 8 + high);
        b[part][n][0] = words[0], b[part][n][1] = words[1], b[part][n + 1][0] = words[2], b[part][n + 1][1] = words[3];
      }
    if constexpr (kDropout) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          drop(b[part][n], k, warp_id() * 32 + n * 8 + lane / 4, num_rows);
    }
#pragma unroll
    for (int m = 0; m < kOuterRanks / 16; ++m) {
      if (m >= groups) continue;
#pragma unroll
      for (int of_g = 0; of_g < 2; ++of_g) {
        uint32_t a[4];
        ldmatrix_transposed<4>(a, g_tile_ + of_g * kGPart + (k + line + high) * kGLine + m * 16 + low);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if (part + of_g == 2) continue;  // low times low is below f32's rounding of the sum
#pragma unroll
          for (int n = 0; n < 4; ++n)
            mma_m16n8k16<bf16>(sums_[m][n], a, b[part][n]);
        }
      }
    }
  }

  /// b: rows k + 2 t, the next, and the two eight further, of a column.
  PYLORA_DEVICE void drop(uint32_t (&b)[2], int k, int column, int num_rows) {
    const unsigned char* kept = kept_ + column / 64 * (kItemRows * 8);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = k + j * 8 + lane_id() % 4 * 2;
      const float2 pair = unpack<bf16>(b[j]);
      // A product, as on the CPU, so that a dropped infinity is a NaN and does not vanish.
      b[j] = pack<bf16>(pair.x * (row < num_rows && is_kept(kept, row, column) ? 1.0f : 0.0f),
                        pair.y * (row + 1 < num_rows && is_kept(kept, row + 1, column) ? 1.0f : 0.0f));
    }
  }

  int64_t* rows_;
  unsigned char* kept_;
  bf16 *g_tile_, *x_tile_;
  float sums_[kOuterRanks / 16][4][4];
};

/// f32 or f64.
template <class T>
class FmaTile {
 public:
  using Element = T;
  using Sum = T;
  static constexpr int kResident = sizeof(T) == 8 ? 3 : 4;
  static constexpr int kColumns = kOuterFmaColumns, kDepth = 16, kGLine = kOuterRanks + 4, kXLine = kColumns + 4;
  static constexpr int kTall = 8, kWide = 4;  // of a thread
  static constexpr int kRowsBytes = kItemRows * static_cast<int>(sizeof(int64_t)), kKeptBytes = kItemRows * 8;
  static constexpr int kSharedBytes =
      kOuterHeader + kRowsBytes + kKeptBytes + kDepth * (kGLine + kXLine) * static_cast<int>(sizeof(T));

  PYLORA_DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < kTall; ++r)
#pragma unroll
      for (int c = 0; c < kWide; ++c)
        sums_[r][c] = 0;
  }

  PYLORA_DEVICE void add(const Plan& plan, const Item& item, const OuterItem<T, T>& of, const DropoutDraw& draw) {
    int64_t* const rows = shared_memory<int64_t>(kOuterHeader);
    unsigned char* const kept = shared_memory<unsigned char>(kOuterHeader + kRowsBytes);
    T* const g_tile = shared_memory<T>(kOuterHeader + kRowsBytes + kKeptBytes);
    T* const x_tile = g_tile + kDepth * kGLine;
    __syncthreads();  // the item before has been read
    for (int r = threadIdx.x; r < item.rows; r += kThreads)
      rows[r] = row_at(plan, item, r);
    __syncthreads();
    if (draw.active()) draw_block(draw, rows, item.rows, of.column / kDropoutBlock, kept);
    for (int first = 0; first < item.rows; first += kDepth) {
      __syncthreads();  // the rows before have been read, and kept is there
      for (int i = threadIdx.x; i < kDepth * kOuterRanks; i += kThreads) {
        const int r = i / kOuterRanks, k = i % kOuterRanks;
        const bool inside = first + r < item.rows && k < of.num_ranks;
        g_tile[r * kGLine + k] = inside ? load_readonly<T>(of.g + rows[first + r] * of.g_stride + k) : T(0);
      }
      for (int i = threadIdx.x; i < kDepth * kColumns; i += kThreads) {
        const int r = i / kColumns, c = i % kColumns;
        const bool inside = first + r < item.rows && c < of.num_columns;
        T value = inside ? load_readonly<T>(of.x + rows[first + r] * of.x_stride + c) : T(0);
        if (draw.active() && inside) value *= is_kept(kept, first + r, c) ? static_cast<T>(draw.keep_scale) : T(0);
        x_tile[r * kXLine + c] = value;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
        multiply_row(g_tile + k * kGLine + rank(), x_tile + k * kXLine + column());
    }
  }

  template <class Body>
  PYLORA_DEVICE void for_each(const Body& body) const {
#pragma unroll
    for (int r = 0; r < kTall; ++r)
#pragma unroll
      for (int c = 0; c < kWide; ++c)
        body(rank() + r, column() + c, sums_[r][c]);
  }

  PYLORA_DEVICE T sum_scale(const DropoutDraw&) const { return 1; }

 private:
  PYLORA_DEVICE int rank() const { return threadIdx.x / (kColumns / kWide) * kTall; }
  PYLORA_DEVICE int column() const { return threadIdx.x % (kColumns / kWide) * kWide; }

  PYLORA_DEVICE void multiply_row(const T* g, const T* x) {
    T b[kWide];
#pragma unroll
    for (int c = 0; c < kWide; ++c)
      b[c] = x[c];
#pragma unroll
    for (int r = 0; r < kTall; ++r) {
      const T a = g[r];
#pragma unroll
      for (int c = 0; c < kWide; ++c)
        sums_[r][c] += a * b[c];
    }
  }

  T sums_[kTall][kWide];
};

}  // namespace pylora::cuda
