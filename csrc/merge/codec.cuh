// The undo log's payloads by a block (README.md has the format), from and to a chunk in shared memory.
#pragma once

#include "cuda/segments.cuh"
#include "merge/heuristics.h"
#include "merge/rounding.cuh"

namespace pylora::merge {

using cuda::kThreads;
using cuda::kWarps;
using cuda::kWarpSize;
using cuda::lane_id;
using cuda::min_of;
using cuda::warp_id;

static_assert(kChunk == 32 * kThreads, "a thread has one word of a chunk's bitmap");

/// A chunk is encoded as sparse if fewer than one in so many of its elements need a correction.
constexpr int kSparsest = 8;
constexpr int kLeastSparse = 64;

/// A chunk's elements in row order, and where they are in lines of shared memory.
struct ChunkShape {
  int width, count;
  int inverse;  // of width, in 2^-20: exact for positions below 4096 and widths up to 128

  PYLORA_DEVICE ChunkShape(int rows, int columns)
      : width(columns), count(rows * columns), inverse((1 << 20) / columns + 1) {}

  PYLORA_DEVICE int place(int position, int line) const {
    const int row = position * inverse >> 20;
    return row * line + position - row * width;
  }
  PYLORA_DEVICE int bitmap_bytes() const { return (count + 7) / 8; }
};

/// What threads before this one have, and all of them. box: kWarps ints of shared memory, free before and after.
struct Scan {
  int before, total;
};

template <class Combine>
PYLORA_DEVICE Scan scan(int value, int nothing, int* box, const Combine& combine) {
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(cuda::kAllLanes, inclusive, step);
    if (lane_id() >= step) inclusive = combine(inclusive, other);
  }
  const int previous = __shfl_up_sync(cuda::kAllLanes, inclusive, 1);
  if (lane_id() == kWarpSize - 1) box[warp_id()] = inclusive;
  __syncthreads();
  Scan result{lane_id() == 0 ? nothing : previous, nothing};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_id()) result.before = combine(result.before, box[w]);
    result.total = combine(result.total, box[w]);
  }
  __syncthreads();
  return result;
}

PYLORA_DEVICE Scan scan_sum(int value, int* box) {
  return scan(value, 0, box, [](int a, int b) { return a + b; });
}
PYLORA_DEVICE Scan scan_most(int value, int* box) {
  return scan(value, 0, box, [](int a, int b) { return a > b ? a : b; });
}

template <class Bits>
PYLORA_DEVICE uint32_t checksum(const Bits* elements, int line, const ChunkShape& shape, int* box) {
  uint32_t sum = 0;
  for (int p = threadIdx.x; p < shape.count; p += kThreads)
    sum += mix_element(elements[shape.place(p, line)], p);
  return static_cast<uint32_t>(scan_sum(static_cast<int>(sum), box).total);
}

/// The lowest one of a mask, which is taken out of it.
PYLORA_DEVICE int take_lowest(uint32_t* mask) {
  const int bit = __ffs(static_cast<int>(*mask)) - 1;
  *mask &= *mask - 1;
  return bit;
}

template <class Bits>
PYLORA_DEVICE void store_bytes(uint8_t* to, Bits bits) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Bits)); ++i)
    cuda::store_global(to + i, static_cast<uint8_t>(bits >> (8 * i)));
}

/// Bytes from `end` on are zeros.
template <class Bits>
PYLORA_DEVICE Bits load_bytes(const uint8_t* from, const uint8_t* end) {
  Bits bits = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Bits)); ++i)
    if (from + i < end) bits |= static_cast<Bits>(static_cast<Bits>(cuda::load_readonly<uint8_t>(from + i)) << (8 * i));
  return bits;
}

/// A chunk's payload: the kind that is the shortest, then its bytes. A thread has 32 neighbouring elements.
template <class Bits>
class Encoder {
 public:
  static constexpr int kSize = static_cast<int>(sizeof(Bits));

  PYLORA_DEVICE Encoder(const int8_t* codes, int line, const ChunkShape& shape, int* box)
      : codes_(codes), line_(line), shape_(shape) {
    const int warp_first = warp_id() * kWarpSize * 32;
    for (int i = 0; i < kWarpSize && warp_first + i * 32 < shape.count; ++i) {
      const int p = warp_first + i * 32 + lane_id();
      const int code = p < shape.count ? codes[shape.place(p, line)] : 0;
      const uint32_t nonzero = __ballot_sync(cuda::kAllLanes, code != 0);
      const uint32_t full = __ballot_sync(cuda::kAllLanes, code == kInFull);
      if (lane_id() == i) nonzero_ = nonzero, full_ = full;
    }
    const int last = nonzero_ ? first() + 31 - __clz(static_cast<int>(nonzero_)) : 0;
    previous_ = scan_most(last, box).before;
    const int ones = scan_sum(__popc(nonzero_), box).total;
    const bool sparse = shape.count >= kLeastSparse && kSparsest * ones < shape.count;
    const Scan both = scan_sum((sparse ? num_pairs() : __popc(nonzero_)) | __popc(full_) << 16, box);
    const int fulls = both.total >> 16;
    entry_ = both.before & 0xffff;
    full_entry_ = both.before >> 16;
    entries_ = both.total & 0xffff;
    bytes_ = sparse ? 2 * entries_ : shape.bitmap_bytes() + entries_;
    full_start_ = bytes_;
    bytes_ += fulls * kSize;
    kind_ = sparse ? ChunkKind::sparse : ChunkKind::bitmap;
    if (ones == 0) {
      kind_ = ChunkKind::empty;
      entries_ = bytes_ = 0;
    } else if (!sparse && bytes_ >= shape.count * kSize) {
      kind_ = ChunkKind::dense;
      entries_ = 0;
      bytes_ = shape.count * kSize;
    }
  }

  PYLORA_DEVICE int bytes() const { return bytes_; }

  /// A ChunkHeader.
  PYLORA_DEVICE uint4 header(int64_t offset, uint32_t checksum) const {
    return {static_cast<uint32_t>(offset),
            (static_cast<uint32_t>(offset >> 32) & 0xffffff) | static_cast<uint32_t>(kind_) << 24, checksum,
            static_cast<uint32_t>(entries_) | static_cast<uint32_t>(bytes_) << 16};
  }

  /// elements: the chunk of W in lines of `elements_line`. out: a multiple of kPayloadUnit.
  PYLORA_DEVICE void write(const Bits* elements, int elements_line, uint8_t* out) const {
    if (kind_ == ChunkKind::empty) return;
    if (kind_ == ChunkKind::dense) {
      for (int p = threadIdx.x; p < shape_.count; p += kThreads)
        cuda::store_global(out + p * kSize, elements[shape_.place(p, elements_line)]);
      return;
    }
    const bool sparse = kind_ == ChunkKind::sparse;
    if (!sparse) write_mask(out);
    int entry = entry_, full_entry = full_entry_, last = previous_;
    for (uint32_t mask = nonzero_; mask;) {
      const int p = first() + take_lowest(&mask);
      const int code = codes_[shape_.place(p, line_)];
      if (sparse) {
        entry = write_pair(out, entry, p - last, code);
        last = p;
      } else {
        cuda::store_global(out + shape_.bitmap_bytes() + entry++, static_cast<uint8_t>(code));
      }
      if (code == kInFull) {
        store_bytes(out + full_start_ + full_entry * kSize, elements[shape_.place(p, elements_line)]);
        ++full_entry;
      }
    }
  }

 private:
  PYLORA_DEVICE int first() const { return static_cast<int>(threadIdx.x) * 32; }

  /// Pairs that only move the position, before one that moves it by `gap` in all.
  static PYLORA_DEVICE int num_fillers(int gap) { return gap > 255 ? (gap - 1) / 255 : 0; }

  PYLORA_DEVICE int num_pairs() const {
    int pairs = 0, last = previous_;
    for (uint32_t mask = nonzero_; mask; ++pairs) {
      const int p = first() + take_lowest(&mask);
      pairs += num_fillers(p - last);
      last = p;
    }
    return pairs;
  }

  static PYLORA_DEVICE int write_pair(uint8_t* out, int entry, int gap, int code) {
    for (int left = num_fillers(gap); left > 0; --left, gap -= 255, ++entry)
      cuda::store_global(out + 2 * entry, static_cast<uint16_t>(255));
    cuda::store_global(out + 2 * entry, static_cast<uint16_t>(gap | (code & 0xff) << 8));
    return entry + 1;
  }

  PYLORA_DEVICE void write_mask(uint8_t* out) const {
    for (int i = 0; i < 4; ++i) {
      const int byte = first() / 8 + i;
      if (byte < shape_.bitmap_bytes()) cuda::store_global(out + byte, static_cast<uint8_t>(nonzero_ >> (8 * i)));
    }
  }

  const int8_t* codes_;
  int line_;
  ChunkShape shape_;
  uint32_t nonzero_ = 0, full_ = 0;    // of this thread's elements
  int previous_, entry_, full_entry_;  // before this thread's
  int entries_, bytes_, full_start_;
  ChunkKind kind_;
};

/// Corrects what taking out computed, in place. Header and payload are trusted no further than memory safety asks, as on
/// the CPU: their sizes have been compared, positions are checked. `end`: of the log's data.
template <class Bits>
class Corrector {
 public:
  PYLORA_DEVICE Corrector(Bits* elements, int line, const ChunkShape& shape, const uint8_t* payload, const uint8_t* end)
      : elements_(elements), line_(line), shape_(shape), payload_(payload), end_(end) {}

  PYLORA_DEVICE void correct(const ChunkHeader& header, int* box) const {
    if (header.is(ChunkKind::sparse)) return correct_sparse(header.entries, box);
    if (header.is(ChunkKind::bitmap)) return correct_bitmap(header.entries, box);
    if (!header.is(ChunkKind::dense)) return;
    for (int p = threadIdx.x; p < shape_.count; p += kThreads)
      elements_[shape_.place(p, line_)] = cuda::load_readonly<Bits>(payload_ + p * sizeof(Bits));
  }

 private:
  PYLORA_DEVICE void correct_sparse(int entries, int* box) const {
    const int share = (entries + kThreads - 1) / kThreads,
              first = min_of(static_cast<int>(threadIdx.x) * share, entries);
    const int last = min_of(first + share, entries);
    int moved = 0, fulls = 0;
    for (int i = first; i < last; ++i) {
      const int pair = cuda::load_readonly<uint16_t>(payload_ + 2 * i);
      moved += pair & 0xff;
      fulls += static_cast<int8_t>(pair >> 8) == kInFull;
    }
    int position = scan_sum(moved, box).before, full = scan_sum(fulls, box).before;
    for (int i = first; i < last; ++i) {
      const int pair = cuda::load_readonly<uint16_t>(payload_ + 2 * i);
      position += pair & 0xff;
      full = apply(position, static_cast<int8_t>(pair >> 8), payload_ + 2 * entries, full);
    }
  }

  PYLORA_DEVICE void correct_bitmap(int entries, int* box) const {
    const int first = static_cast<int>(threadIdx.x) * 32;
    const uint8_t* const codes = payload_ + shape_.bitmap_bytes();
    uint32_t ones = load_bytes<uint32_t>(payload_ + first / 8, codes);
    if (shape_.count - first < 32) ones &= (1u << (shape_.count > first ? shape_.count - first : 0)) - 1;
    const int before = scan_sum(__popc(ones), box).before;
    int fulls = 0, entry = before;
    for (uint32_t mask = ones; mask && entry < entries; mask &= mask - 1)
      fulls += static_cast<int8_t>(cuda::load_readonly<uint8_t>(codes + entry++)) == kInFull;
    int full = scan_sum(fulls, box).before;
    entry = before;
    for (uint32_t mask = ones; mask && entry < entries;) {
      const int p = first + take_lowest(&mask);
      full = apply(p, static_cast<int8_t>(cuda::load_readonly<uint8_t>(codes + entry++)), codes + entries, full);
    }
  }

  /// Answers the place of the next element in full.
  PYLORA_DEVICE int apply(int position, int code, const uint8_t* fulls, int full) const {
    if (position >= shape_.count) return full;
    Bits& element = elements_[shape_.place(position, line_)];
    if (code > kIsMinusZero) {
      element = static_cast<Bits>(element + static_cast<Bits>(code));
    } else if (code == kIsMinusZero) {
      element = kMinusZero<Bits>;
    } else {
      element = load_bytes<Bits>(fulls + full * static_cast<int>(sizeof(Bits)), end_);
      ++full;
    }
    return full;
  }

  Bits* elements_;
  int line_;
  ChunkShape shape_;
  const uint8_t *payload_, *end_;
};

}  // namespace pylora::merge
