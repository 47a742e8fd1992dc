// The two kinds of work of decode.cu: a part of shrink, and a tile of expand.
#pragma once

#include "cuda/segments.cuh"

namespace pylora::cuda {

struct Group {
  Item item;
  int64_t index;
  int rank;
};

constexpr int kDecodeHeader = 128, kDecodeColumns = 128;
/// The four warps' sums [16 ranks][8 tokens].
constexpr int kShrinkShared = kWarps * 128 * static_cast<int>(sizeof(float));

/// Plane of a part of the width: [8 tokens][ranks of all slices].
PYLORA_DEVICE float* plane_of(const DecodeArgs& args, const Group& group, int64_t split) {
  const int64_t ranks = args.slots.max_rank * args.num_slices;
  return args.planes + (split * args.plan.max_items + group.index) * kDecodeRows * ranks;
}

/// Row n of the factors of all slices: element 0, or null past the last.
template <class T>
PYLORA_DEVICE const T* a_row(const DecodeArgs& args, const Group& group, int n, int64_t* step) {
  if (n >= group.rank * args.num_slices) return nullptr;
  const FactorView a = view_of(args.a[n / group.rank], group.item.slot);
  *step = a.column_stride;
  return static_cast<const T*>(a.data) + a.first + n % group.rank * a.rank_stride;
}

/// Eight columns, zeros from `valid` on or where there is no row.
template <class T, bool kVector>
PYLORA_DEVICE uint4 load_columns(const T* row, int64_t column, int64_t step, int valid) {
  if constexpr (kVector) {
    if (!row) return {0, 0, 0, 0};
    return load_eight<T, true>(row + column, valid);
  }
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (row && e < valid)
      words[e / 2] |= static_cast<uint32_t>(load_readonly<T>(row + (column + e) * step).bits) << (e % 2 * 16);
  return {words[0], words[1], words[2], words[3]};
}

/// v of kDecodeSplit columns into their plane. Fragments come straight from global memory: lane t of a quad takes eight
/// neighbouring columns of its rows of a and x, which are two steps of sixteen with the columns renumbered, for a and x
/// alike. A warp has a quarter of the columns.
template <class T, bool kVector>
PYLORA_DEVICE void shrink_part(const DecodeArgs& args, const Group& group, int64_t split, float* warp_sums) {
  const int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
  const int64_t first = split * kDecodeSplit + warp * (kDecodeSplit / kWarps);
  const int ranks = group.rank * args.num_slices, rows = group.item.rows;
  const T* const x =
      g < rows ? static_cast<const T*>(args.x.data) + row_at(args.plan, group.item, g) * args.x.row_stride : nullptr;
  float* const plane = plane_of(args, group, split);
  for (int r = 0; r < ranks; r += 16) {
    float sums[4] = {0, 0, 0, 0};
    int64_t step = 1, step8 = 1;
    const T *const a = a_row<T>(args, group, r + g, &step), *const a8 = a_row<T>(args, group, r + g + 8, &step8);
#pragma unroll(kVector ? 4 : 1)
    for (int k = 0; k < kDecodeSplit / kWarps; k += 32) {
      const int64_t column = first + k + t * 8;
      const int valid = left_of(args.width, column);
      const uint4 low = load_columns<T, kVector>(a, column, step, valid);
      const uint4 high = load_columns<T, kVector>(a8, column, step8, valid);
      const uint4 xs = load_columns<T, kVector>(x, column, 1, valid);
      const uint32_t a0[4] = {low.x, high.x, low.y, high.y}, b0[2] = {xs.x, xs.y};
      const uint32_t a1[4] = {low.z, high.z, low.w, high.w}, b1[2] = {xs.z, xs.w};
      mma_m16n8k16<T>(sums, a0, b0);
      mma_m16n8k16<T>(sums, a1, b1);
    }
    __syncthreads();  // the sums of the ranks before have been read
#pragma unroll
    for (int i = 0; i < 4; ++i)
      warp_sums[warp * 128 + (g + i / 2 * 8) * 8 + t * 2 + i % 2] = sums[i];
    __syncthreads();
    const int rank = threadIdx.x % 16, token = threadIdx.x / 16;  // 128 sums, one a thread
    float v = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      v += warp_sums[w * 128 + rank * 8 + token];
    if (r + rank < ranks && token < rows) store_global(plane + token * ranks + r + rank, v);
  }
}

/// y of a group and 128 columns of a slice. kAcross: b's ranks lie side by side in memory. In shared memory: b as
/// [ranks][columns], or [columns][ranks] where kAcross, in bf16 parts (f16 has two), v in two bf16 parts, the sums.
template <class T, bool kVector, bool kAcross>
class ExpandTile {
 public:
  static constexpr int kParts = std::is_same_v<T, bf16> ? 1 : 2;
  static constexpr int kDepth = kParts == 1 ? 64 : 32;
  static constexpr int kBLine = (kAcross ? kDepth : kDecodeColumns) + 8;
  static constexpr int kBPart = kBLine * (kAcross ? kDecodeColumns : kDepth);
  static constexpr int kVLine = kDepth + 8, kVPart = kDecodeRows * kVLine, kSumLine = kDecodeColumns + 4;
  static constexpr int kSharedBytes =
      (kParts * kBPart + 2 * kVPart) * static_cast<int>(sizeof(bf16)) + kDecodeRows * kSumLine * 4;

  PYLORA_DEVICE ExpandTile(const DecodeArgs& args, const Group& group, int slice, int64_t column)
      : args_(args), group_(group), slice_(slice), column_(column) {
    b_tile_ = shared_memory<bf16>(kDecodeHeader);
    v_tile_ = b_tile_ + kParts * kBPart;
    sums_ = reinterpret_cast<float*>(v_tile_ + 2 * kVPart);
    num_columns_ = left_of(args.widths[slice], column);
    const int token = threadIdx.x / 16, c = threadIdx.x % 16 * 8;
    if (token < group.item.rows) {
      y_at_ = static_cast<T*>(args.y.data) + row_at(args.plan, group.item, token) * args.y.row_stride +
              args.columns[slice] + column + c;
      valid_ = num_columns_ - c;
    }
  }

  /// What does not depend on v.
  PYLORA_DEVICE void fetch() {
    y_ = load_eight<T, kVector, false>(y_at_, valid_);
    fetch_b(0);
  }

  PYLORA_DEVICE void multiply() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        acc_[m][i] = 0;
    for (int first = 0; first < group_.rank; first += kDepth) {
      if (first > 0) {
        __syncthreads();  // the ranks before have been read
        fetch_b(first);
      }
      load_v(first);
      if (kCopies) cp_async_wait<0>();
      __syncthreads();
      const int depth = (min_of(kDepth, group_.rank - first) + 15) / 16 * 16;
      for (int k = 0; k < depth; k += 16)
        multiply_ranks(k);
    }
  }

  PYLORA_DEVICE void add() {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums_[(t * 2 + i % 2) * kSumLine + warp_id() * 32 + m * 16 + g + i / 2 * 8] = acc_[m][i];
    __syncthreads();
    const float scaling = scaling_of<float>(args_.slots, group_.item.slot);
    const float* sums = sums_ + threadIdx.x / 16 * kSumLine + threadIdx.x % 16 * 8;
    const uint32_t words[4] = {y_.x, y_.y, y_.z, y_.w};
    float out[8];
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const float2 pair = unpack<T>(words[e / 2]);
      out[e] = pair.x + scaling * sums[e];
      out[e + 1] = pair.y + scaling * sums[e + 1];
    }
    store_eight<T, kVector>(y_at_, out, valid_);
  }

 private:
  static constexpr bool kCopies = kVector && kParts == 1;

  PYLORA_DEVICE void fetch_b(int first) {
    const FactorView b = view_of(args_.b[slice_], group_.item.slot);
    const T* data = static_cast<const T*>(b.data) + b.first + column_ * b.column_stride + first * b.rank_stride;
    const int left = min_of(kDepth, group_.rank - first), depth = (left + 15) / 16 * 16;
    const int lines = kAcross ? kDecodeColumns : depth, groups = (kAcross ? depth : kDecodeColumns) / 8;
    for (int i = threadIdx.x; i < lines * groups; i += kThreads) {
      const int line = i / groups, e = i % groups * 8;
      const int rank = kAcross ? e : line, column = kAcross ? line : e;
      const bool inside = rank < left && column < num_columns_;
      const int valid = !inside ? 0 : kAcross ? left - rank : num_columns_ - column;
      const T* p = data + rank * b.rank_stride + column * b.column_stride;
      bf16* to = b_tile_ + line * kBLine + e;
      if constexpr (kCopies) {
        fetch_eight<bf16, true>(to, p, valid, args_.x.data);
      } else {
        convert_eight(to, p, kAcross ? b.rank_stride : b.column_stride, valid);
      }
    }
    if (kCopies) cp_async_commit();
  }

  PYLORA_DEVICE void convert_eight(bf16* to, const T* p, int64_t step, int valid) {
    float values[8];
#pragma unroll
    for (int e = 0; e < 8; ++e)
      values[e] = e < valid ? widen(load_readonly<T>(p + e * step)) : 0.0f;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      *reinterpret_cast<uint32_t*>(to + e) = pack<bf16>(values[e], values[e + 1]);
      if (kParts == 2)
        *reinterpret_cast<uint32_t*>(to + kBPart + e) = pack<bf16>(residual(values[e]), residual(values[e + 1]));
    }
  }

  /// Sums the planes in their order, so that the result does not depend on who came first.
  PYLORA_DEVICE float sum_of_planes(int token, int n) const {
    const int64_t splits = decode_splits(args_.width);
    const int ranks = group_.rank * args_.num_slices;
    float sum = 0;
    for (int64_t split = 0; split < splits; ++split)
      sum += load_coherent<float>(plane_of(args_, group_, split) + token * ranks + n);
    return sum;
  }

  PYLORA_DEVICE void load_v(int first) {
    const int left = min_of(kDepth, group_.rank - first), depth = (left + 15) / 16 * 16;
    const bool wanted = args_.v.data && column_ == 0;
    for (int i = threadIdx.x; i < kDecodeRows * (depth / 2); i += kThreads) {
      const int token = i / (depth / 2), k = i % (depth / 2) * 2;
      float pair[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (token >= group_.item.rows || k + j >= left) continue;
        pair[j] = sum_of_planes(token, slice_ * group_.rank + first + k + j);
        if (wanted)
          store_global(static_cast<float*>(args_.v.data) + slice_ * args_.v.slice_stride +
                           row_at(args_.plan, group_.item, token) * args_.v.row_stride + first + k + j,
                       pair[j]);
      }
      bf16* to = v_tile_ + token * kVLine + k;
      *reinterpret_cast<uint32_t*>(to) = pack<bf16>(pair[0], pair[1]);
      *reinterpret_cast<uint32_t*>(to + kVPart) = pack<bf16>(residual(pair[0]), residual(pair[1]));
    }
  }

  PYLORA_DEVICE void multiply_ranks(int k) {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    uint32_t b[2][2];
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        b[part][j] = *reinterpret_cast<const uint32_t*>(v_tile_ + part * kVPart + g * kVLine + k + j * 8 + t * 2);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int column = warp_id() * 32 + m * 16;
        const bf16* const tile = b_tile_ + part * kBPart;
        uint32_t a[4];
        if constexpr (kAcross) {
          ldmatrix<4>(a, tile + (column + lane % 16) * kBLine + k + lane / 16 * 8);
        } else {
          ldmatrix_transposed<4>(a, tile + (k + lane % 8 + lane / 16 * 8) * kBLine + column + lane / 8 % 2 * 8);
        }
#pragma unroll
        for (int of_v = 0; of_v < 2 - part; ++of_v)  // low times low is below f32's rounding of the sum
          mma_m16n8k16<bf16>(acc_[m], a, b[of_v]);
      }
  }

  const DecodeArgs& args_;
  const Group& group_;
  int slice_;
  int64_t column_;
  int num_columns_, valid_ = 0;
  T* y_at_ = nullptr;
  uint4 y_;
  bf16 *b_tile_, *v_tile_;
  float *sums_, acc_[2][4];
};

}  // namespace pylora::cuda
