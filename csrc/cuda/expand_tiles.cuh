// A block's products in expand, by tensor cores or by FMA, and how the sums are added to y.
#pragma once

#include "cuda/quads.cuh"
#include "cuda/segments.cuh"

namespace pylora::cuda {

/// v of one slice.
template <class C>
struct VRows {
  const C* data;
  int64_t stride;
};

/// Columns of one slot's factor, from the tile's first one on.
struct FactorColumns {
  const void* data;
  DType dtype;
  int64_t offset, rank_stride, column_stride;
  int num_columns;  // to the end of the slice: may be more than the tile has
};

template <class T>
struct YTile {
  T* data;  // the tile's first column
  int64_t stride;
  int64_t column;  // of the slice, for dropout
};

/// Parts of bf16 that hold an element of a factor: f16 exactly, f32 with 16 bits.
template <class F>
constexpr int kParts = std::is_same_v<F, bf16> ? 1 : 2;

/// T: bf16 or f16, of y. F: of the factor. kVector: 16 bytes at a time. kAcross: the factor's ranks are what lies side by
/// side in memory.
///
/// In shared memory: the factor as [ranks][128 columns], or [128 columns][ranks] where kAcross, and v as [64 rows][ranks];
/// all as bf16 parts. Rows are 8 elements longer, so that ldmatrix finds its rows in different banks.
template <class T, class F, bool kVector, bool kAcross>
class TensorTile {
 public:
  using Element = T;
  using Sum = float;
  static constexpr int kResident = kVector ? 3 : 2;
  static constexpr int kColumns = 128, kDepth = kParts<F> == 1 ? 64 : 32;
  static constexpr int kVLine = kDepth + 8, kFLine = kAcross ? kDepth + 8 : kColumns + 8;
  static constexpr int kFPart = kFLine * (kAcross ? kColumns : kDepth), kVPart = kItemRows * kVLine;
  static constexpr int kSharedBytes = (kParts<F> * kFPart + 2 * kVPart) * static_cast<int>(sizeof(bf16));

  PYLORA_DEVICE void begin(const Plan& plan, const Item& item) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = warp_id() * 16 + h * 8 + lane_id() / 4;
      row_[h] = r < item.rows ? static_cast<int32_t>(row_at(plan, item, r)) : -1;
    }
  }

  PYLORA_DEVICE void multiply(const Plan& plan, const Item& item, const VRows<float>& v, const FactorColumns& f,
                              int rank) {
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums_[j][i] = 0;
    bf16* const f_tile = shared_memory<bf16>();
    bf16* const v_tile = f_tile + kParts<F> * kFPart;
    for (int first = 0; first < rank; first += kDepth) {
      const int left = min_of(kDepth, rank - first), depth = (left + 15) / 16 * 16;
      __syncthreads();  // the ranks before have been read
      fetch_factor(f_tile, f, first, left, depth);
      load_v(v_tile, plan, item, v, first, left, depth);
      if (kCopies) cp_async_wait<0>();
      __syncthreads();
      if (warp_id() * 16 >= item.rows) continue;  // a warp without rows multiplies nothing
#pragma unroll 1
      for (int k = 0; k < depth; k += 16)
        multiply_ranks(f_tile, v_tile, k);
    }
  }

  PYLORA_DEVICE void add(const YTile<T>& y, int num_columns, float scaling, const DropoutDraw& draw) {
    if (draw.active()) drop(y.column, draw);
    const int t = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* p = y.data + (row_[h] < 0 ? 0 : row_[h]) * y.stride + t * 8;
      const int valid = row_[h] < 0 ? 0 : num_columns - t * 8;
      uint4 old[4];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        old[q] = load_eight<T, kVector, false>(p + q * 32, valid - q * 32);
#pragma unroll
      for (int q = 0; q < 4; ++q) {  // four tiles of eight columns: this lane gets tile 4 q + t
        float pairs[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          pairs[j][0] = sums_[4 * q + j][2 * h], pairs[j][1] = sums_[4 * q + j][2 * h + 1];
        transpose_quad(pairs, t);
        const uint32_t words[4] = {old[q].x, old[q].y, old[q].z, old[q].w};
        float out[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 pair = unpack<T>(words[j]);
          out[2 * j] = pair.x + scaling * pairs[j][0];
          out[2 * j + 1] = pair.y + scaling * pairs[j][1];
        }
        store_eight<T, kVector>(p + q * 32, out, valid - q * 32);
      }
    }
  }

 private:
  /// Whether the factor goes to shared memory as it is.
  static constexpr bool kCopies = kVector && kParts<F> == 1;

  PYLORA_DEVICE void fetch_factor(bf16* f_tile, const FactorColumns& f, int first, int left, int depth) {
    const F* data = static_cast<const F*>(f.data) + f.offset + first * f.rank_stride;
    const int groups = kAcross ? depth / 8 : kColumns / 8, lines = kAcross ? kColumns : depth;
    for (int i = threadIdx.x; i < lines * groups; i += kThreads) {
      const int line = i / groups, e = i % groups * 8;
      const int rank = kAcross ? e : line, column = kAcross ? line : e;
      const bool inside = rank < left && column < f.num_columns;
      const int valid = !inside ? 0 : kAcross ? left - rank : f.num_columns - column;
      const F* p = data + rank * f.rank_stride + column * f.column_stride;
      bf16* to = f_tile + line * kFLine + e;
      if constexpr (kCopies) {
        fetch_eight<bf16, true>(to, p, valid, f.data);
      } else {
        convert_eight(to, p, kAcross ? f.rank_stride : f.column_stride, valid);
      }
    }
    if (kCopies) cp_async_commit();
  }

  /// Eight elements as bf16 parts.
  PYLORA_DEVICE void convert_eight(bf16* to, const F* p, int64_t step, int valid) {
    float values[8];
#pragma unroll
    for (int e = 0; e < 8; ++e)
      values[e] = e < valid ? widen(load_readonly<F>(p + e * step)) : 0.0f;
    store_parts(to, values);
  }

  PYLORA_DEVICE void store_parts(bf16* to, const float (&values)[8]) {
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      *reinterpret_cast<uint32_t*>(to + e) = pack<bf16>(values[e], values[e + 1]);
      if (kParts<F> == 2)
        *reinterpret_cast<uint32_t*>(to + kFPart + e) = pack<bf16>(residual(values[e]), residual(values[e + 1]));
    }
  }

  PYLORA_DEVICE void load_v(bf16* v_tile, const Plan& plan, const Item& item, const VRows<float>& v, int first,
                            int left, int depth) {
    for (int i = threadIdx.x; i < kItemRows * (depth / 2); i += kThreads) {
      const int r = i / (depth / 2), k = i % (depth / 2) * 2;
      float pair[2] = {0, 0};
      if (r < item.rows) {
        const float* p = v.data + row_at(plan, item, r) * v.stride + first + k;
        if (k < left) pair[0] = load_readonly<float>(p);
        if (k + 1 < left) pair[1] = load_readonly<float>(p + 1);
      }
      bf16* to = v_tile + r * kVLine + k;
      *reinterpret_cast<uint32_t*>(to) = pack<bf16>(pair[0], pair[1]);
      *reinterpret_cast<uint32_t*>(to + kVPart) = pack<bf16>(residual(pair[0]), residual(pair[1]));
    }
  }

  PYLORA_DEVICE void multiply_ranks(const bf16* f_tile, const bf16* v_tile, int k) {
    const int lane = lane_id(), high = lane / 16 * 8, low = lane / 8 % 2 * 8, line = lane % 8;
    uint32_t a[2][4];
#pragma unroll
    for (int part = 0; part < 2; ++part)
      ldmatrix<4>(a[part], v_tile + part * kVPart + (warp_id() * 16 + lane % 16) * kVLine + k + high);
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
#pragma unroll
      for (int part = 0; part < kParts<F>; ++part) {
        uint32_t b[4];
        if constexpr (kAcross) {
          ldmatrix<4>(b, f_tile + part * kFPart + (j * 8 + high + line) * kFLine + k + low);
        } else {
          ldmatrix_transposed<4>(b, f_tile + part * kFPart + (k + low + line) * kFLine + j * 8 + high);
        }
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int of_v = 0; of_v < 2 - part; ++of_v) {  // low times low is below f32's rounding of the sum
          mma_m16n8k16<bf16>(sums_[j], a[of_v], b0);
          mma_m16n8k16<bf16>(sums_[j + 1], a[of_v], b1);
        }
      }
    }
  }

  /// Before the quads are transposed a lane has whole counters: columns 8 v + 2 t and the next of each 64.
  PYLORA_DEVICE void drop(int64_t column, const DropoutDraw& draw) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int block = 0; block < kColumns / 64; ++block)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t kept = draw.kept(row_[h], column / 64 + block, 2 * t + i);
#pragma unroll
          for (int v = 0; v < 8; ++v)
            sums_[8 * block + v][2 * h + i] *= kept >> v & 1 ? static_cast<float>(draw.keep_scale) : 0.0f;
        }
  }

  int32_t row_[2];
  float sums_[16][4];
};

/// Any dtypes. kVector: f32 throughout, 16 bytes at a time.
template <class T, bool kVector>
class FmaTile {
 public:
  using Element = T;
  using Sum = Accumulator<T>;
  static constexpr int kResident = sizeof(Sum) == 8 ? 3 : 4;
  static constexpr int kColumns = 64, kDepth = 16, kVLine = kItemRows + 4, kFLine = kColumns + 4;
  static constexpr int kRows = 8, kWide = 4;  // of a thread
  static constexpr int kHeader = kItemRows * (static_cast<int>(sizeof(int64_t)) + 8);
  static constexpr int kSharedBytes = kHeader + kDepth * (kVLine + kFLine) * static_cast<int>(sizeof(Sum));

  PYLORA_DEVICE void begin(const Plan& plan, const Item& item) {
    num_rows_ = item.rows;
    __syncthreads();  // the tile before has been added
    int64_t* rows = shared_memory<int64_t>();
    for (int r = threadIdx.x; r < item.rows; r += kThreads)
      rows[r] = row_at(plan, item, r);
  }

  PYLORA_DEVICE void multiply(const Plan&, const Item&, const VRows<Sum>& v, const FactorColumns& f, int rank) {
    Sum* const v_tile = shared_memory<Sum>(kHeader);
    Sum* const f_tile = v_tile + kDepth * kVLine;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kWide; ++c)
        sums_[r][c] = 0;
    for (int first = 0; first < rank; first += kDepth) {
      __syncthreads();  // the ranks before have been read, and the rows are there
      load_v(v_tile, v, first, rank);
      load_factor(f_tile, f, first, rank);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        Sum a[kRows], b[kWide];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          a[r] = v_tile[k * kVLine + row() + r];
#pragma unroll
        for (int c = 0; c < kWide; ++c)
          b[c] = f_tile[k * kFLine + column() + c];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int c = 0; c < kWide; ++c)
            sums_[r][c] += a[r] * b[c];
      }
    }
  }

  PYLORA_DEVICE void add(const YTile<T>& y, int num_columns, Sum scaling, const DropoutDraw& draw) {
    const int64_t* rows = shared_memory<int64_t>();
    unsigned char* kept = shared_memory<unsigned char>(kItemRows * sizeof(int64_t));
    if (draw.active()) {
      draw_block(draw, rows, num_rows_, y.column / kDropoutBlock, kept);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row() + r >= num_rows_) continue;
      T* p = y.data + rows[row() + r] * y.stride + column();
      if (draw.active()) {
#pragma unroll
        for (int c = 0; c < kWide; ++c)
          sums_[r][c] *= is_kept(kept, row() + r, column() + c) ? static_cast<Sum>(draw.keep_scale) : Sum(0);
      }
      add_row(p, r, num_columns - column(), scaling);
    }
  }

 private:
  PYLORA_DEVICE int row() const { return threadIdx.x / (kColumns / kWide) * kRows; }
  PYLORA_DEVICE int column() const { return threadIdx.x % (kColumns / kWide) * kWide; }

  PYLORA_DEVICE void add_row(T* p, int r, int valid, Sum scaling) {
    if constexpr (kVector) {
      if (valid <= 0) return;
      const float4 old = load_global<float4>(p);
      store_global(p, float4{old.x + scaling * sums_[r][0], old.y + scaling * sums_[r][1],
                             old.z + scaling * sums_[r][2], old.w + scaling * sums_[r][3]});
    } else {
#pragma unroll
      for (int c = 0; c < kWide; ++c)
        if (c < valid) store_global(p + c, narrow<T>(widen(load_global<T>(p + c)) + scaling * sums_[r][c]));
    }
  }

  PYLORA_DEVICE void load_v(Sum* v_tile, const VRows<Sum>& v, int first, int rank) {
    const int64_t* rows = shared_memory<int64_t>();
    for (int i = threadIdx.x; i < kItemRows * kDepth; i += kThreads) {
      const int r = i / kDepth, k = i % kDepth;
      const bool inside = r < num_rows_ && first + k < rank;
      v_tile[k * kVLine + r] = inside ? load_readonly<Sum>(v.data + rows[r] * v.stride + first + k) : Sum(0);
    }
  }

  PYLORA_DEVICE void load_factor(Sum* f_tile, const FactorColumns& f, int first, int rank) {
    if constexpr (kVector) {
      for (int i = threadIdx.x; i < kDepth * (kColumns / 4); i += kThreads) {
        const int k = i / (kColumns / 4), c = i % (kColumns / 4) * 4;
        const float* p = static_cast<const float*>(f.data) + f.offset + (first + k) * f.rank_stride + c;
        const bool inside = first + k < rank && c < f.num_columns;
        *reinterpret_cast<float4*>(f_tile + k * kFLine + c) = inside ? load_readonly<float4>(p) : float4{0, 0, 0, 0};
      }
    } else {
      const bool across = f.column_stride != 1;  // neighbouring threads read neighbours in memory
      for (int i = threadIdx.x; i < kDepth * kColumns; i += kThreads) {
        const int k = across ? i % kDepth : i / kColumns, c = across ? i / kDepth : i % kColumns;
        const bool inside = first + k < rank && c < f.num_columns;
        const int64_t index = f.offset + (first + k) * f.rank_stride + c * f.column_stride;
        f_tile[k * kFLine + c] = inside ? load_element<Sum>(f.data, f.dtype, index) : Sum(0);
      }
    }
  }

  int num_rows_;
  Sum sums_[kRows][kWide];
};

}  // namespace pylora::cuda
