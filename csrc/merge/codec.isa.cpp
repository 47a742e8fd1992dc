// The undo log's payloads (README.md has the format), and checksums. Of a chunk's codes, a byte an element, the nonzero
// ones are found 64 at a time as a mask; from there the work is per entry.
#include "cpu/simd/vec.h"
#include "merge/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pylora::PYLORA_ISA {
namespace {

using merge::ChunkHeader;
using merge::ChunkKind;
using merge::Codec;
using merge::kChunk;

constexpr int64_t kMaskWidth = 64;
/// A chunk is encoded as sparse if fewer than one in so many of its elements need a correction.
constexpr int64_t kSparsest = 8;

// Codes of a payload that are no difference.
constexpr int8_t kInFull = -128, kIsMinusZero = -127;
template <class W>
constexpr W kMinusZero = static_cast<W>(W{1} << (8 * sizeof(W) - 1));

/// Of the tiles' codes: those that may have been clamped, and -127.
PYLORA_INLINE bool is_extreme(int8_t code) { return static_cast<uint8_t>(code - 127) <= 2; }

constexpr int64_t num_masks(int64_t count) { return (count + kMaskWidth - 1) / kMaskWidth; }
constexpr int64_t bitmap_bytes(int64_t count) { return (count + 7) / 8; }

/// Bit j: codes[j] != 0.
PYLORA_INLINE uint64_t nonzero_mask(const int8_t* codes) {
  uint64_t mask = 0;
#if defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * i));
    const int zeros = _mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256()));
    mask |= static_cast<uint64_t>(~static_cast<uint32_t>(zeros)) << (32 * i);
  }
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i));
    const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_setzero_si128()));
    mask |= static_cast<uint64_t>(~zeros & 0xffff) << (16 * i);
  }
#else
  for (int j = 0; j < kMaskWidth; ++j)
    mask |= static_cast<uint64_t>(codes[j] != 0) << j;
#endif
  return mask;
}

PYLORA_INLINE int count_ones(uint64_t mask) { return __builtin_popcountll(mask); }

#if defined(__SSSE3__)
/// For every mask of eight codes, the shuffles that move the chosen ones to the front and back to their places.
struct Shuffles {
  uint8_t compress[256][8] = {};
  uint8_t expand[256][8] = {};

  constexpr Shuffles() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int j = 0; j < 8; ++j) {
        const bool chosen = mask >> j & 1;
        expand[mask][j] = static_cast<uint8_t>(chosen ? count : 0x80);
        if (chosen) compress[mask][count++] = static_cast<uint8_t>(j);
      }
    }
  }
};
constexpr Shuffles kShuffles;

PYLORA_INLINE void shuffle8(const int8_t* from, const uint8_t* order, int8_t* to) {
  const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(order));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(v, places));
}
#endif

/// Appends codes[j] for the ones of mask; returns the end. Writes up to 7 bytes beyond it.
PYLORA_INLINE int8_t* compress(const int8_t* codes, uint64_t mask, int8_t* out) {
#if defined(__SSSE3__)
  for (int j = 0; j < kMaskWidth; j += 8) {
    const unsigned part = mask >> j & 0xff;
    shuffle8(codes + j, kShuffles.compress[part], out);
    out += count_ones(part);
  }
#else
  for (; mask; mask &= mask - 1)
    *out++ = codes[__builtin_ctzll(mask)];
#endif
  return out;
}

/// codes[j] = the next of `from` for the ones of mask, 0 for its zeros; returns the end. Reads up to 7 bytes beyond.
PYLORA_INLINE const int8_t* expand(const int8_t* from, uint64_t mask, int8_t* codes) {
#if defined(__SSSE3__)
  for (int j = 0; j < kMaskWidth; j += 8) {
    const unsigned part = mask >> j & 0xff;
    shuffle8(from, kShuffles.expand[part], codes + j);
    from += count_ones(part);
  }
#else
  for (int j = 0; j < kMaskWidth; ++j)
    codes[j] = 0;
  for (; mask; mask &= mask - 1)
    codes[__builtin_ctzll(mask)] = *from++;
#endif
  return from;
}

/// Positions of the ones of `masks`, in order. Four are written whether they are there or not, which saves a
/// mispredicted branch for most masks.
constexpr uint64_t kLastBit = uint64_t{1} << 63;
int64_t find_ones(const uint64_t* masks, int64_t count, uint16_t* out) {
  uint16_t* end = out;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t mask = masks[i];
    const int ones = count_ones(mask);
    const uint16_t base = static_cast<uint16_t>(i * kMaskWidth);
    for (int j = 0; j < 4; ++j) {
      end[j] = static_cast<uint16_t>(base + __builtin_ctzll(mask | kLastBit));
      mask &= mask - 1;
    }
    for (int j = 4; j < ones; ++j, mask &= mask - 1)
      end[j] = static_cast<uint16_t>(base + __builtin_ctzll(mask));
    end += ones;
  }
  return end - out;
}

/// Bit j of masks[i]: codes[64 i + j] != 0, for i up to num_masks(count). Answers how many are.
int64_t make_masks(const int8_t* codes, int64_t count, uint64_t* masks) {
  int64_t ones = 0;
  for (int64_t i = 0; i < num_masks(count); ++i) {
    masks[i] = nonzero_mask(codes + i * kMaskWidth);
    const int64_t left = count - i * kMaskWidth;
    if (left < kMaskWidth) masks[i] &= (uint64_t{1} << left) - 1;
    ones += count_ones(masks[i]);
  }
  return ones;
}

/// Positions of the codes that are no difference, and of 127. Room for 4 more is needed.
int64_t find_extremes(const int8_t* codes, int64_t count, uint16_t* positions) {
  uint8_t any = 0;
  for (int64_t i = 0; i < count; ++i)
    any |= is_extreme(codes[i]);
  if (!any) return 0;
  alignas(64) int8_t flags[kChunk];
  for (int64_t i = 0; i < count; ++i)
    flags[i] = is_extreme(codes[i]);
  uint64_t masks[kChunk / kMaskWidth];
  make_masks(flags, count, masks);
  return find_ones(masks, num_masks(count), positions);
}

// ---- encoding ----

/// Makes of the codes that were clamped, and of -127, what the payload says instead; appends the elements that it holds
/// in full to `full`, and answers how many.
template <class W>
int64_t replace_extremes(int8_t* codes, const W* w, int64_t count, W* full) {
  uint16_t positions[kChunk + 4];
  const int64_t extremes = find_extremes(codes, count, positions);
  int64_t appended = 0;
  for (int64_t i = 0; i < extremes; ++i) {
    const W element = w[positions[i]];
    codes[positions[i]] = element == kMinusZero<W> ? kIsMinusZero : kInFull;
    full[appended] = element;
    appended += element != kMinusZero<W>;
  }
  return appended;
}

uint8_t* encode_sparse(const int8_t* codes, const uint64_t* masks, int64_t count, int64_t ones, uint8_t* out) {
  uint16_t position[kChunk / kSparsest + 4];
  find_ones(masks, num_masks(count), position);
  int last = 0;
  for (int64_t i = 0; i < ones; ++i) {
    int gap = position[i] - last;
    last = position[i];
    for (; gap > 255; gap -= 255) {
      *out++ = 255;
      *out++ = 0;
    }
    *out++ = static_cast<uint8_t>(gap);
    *out++ = static_cast<uint8_t>(codes[last]);
  }
  return out;
}

/// Writes up to 7 bytes beyond its end.
uint8_t* encode_bitmap(const int8_t* codes, const uint64_t* masks, int64_t count, uint8_t* out) {
  __builtin_memcpy(out, masks, bitmap_bytes(count));
  int8_t* end = reinterpret_cast<int8_t*>(out + bitmap_bytes(count));
  for (int64_t i = 0; i < num_masks(count); ++i)
    end = compress(codes + i * kMaskWidth, masks[i], end);
  return reinterpret_cast<uint8_t*>(end);
}

template <class W>
int64_t encode(int8_t* codes, const void* w, int64_t count, ChunkHeader* header, uint8_t* out) {
  constexpr int64_t kBytes = sizeof(W);
  uint64_t masks[kChunk / kMaskWidth];
  const int64_t ones = make_masks(codes, count, masks);
  header->entries = 0;
  header->set(ChunkKind::empty);
  if (ones == 0) return 0;
  W full[kChunk];
  const int64_t num_full = replace_extremes(codes, static_cast<const W*>(w), count, full);
  uint8_t* end = out;
  // Two bytes an entry against one and a bit for every element. A sparse payload of 1 / 8 of the elements stays below
  // the dense one even if every entry is in full, but for a few elements.
  if (count >= kMaskWidth && kSparsest * ones < count) {
    end = encode_sparse(codes, masks, count, ones, out);
    header->set(ChunkKind::sparse);
    header->entries = static_cast<uint16_t>((end - out) / 2);
  } else if (bitmap_bytes(count) + ones + num_full * kBytes < count * kBytes) {
    end = encode_bitmap(codes, masks, count, out);
    header->set(ChunkKind::bitmap);
    header->entries = static_cast<uint16_t>(ones);
  } else {
    header->set(ChunkKind::dense);
    __builtin_memcpy(out, w, count * kBytes);
    return count * kBytes;
  }
  __builtin_memcpy(end, full, num_full * kBytes);
  return end + num_full * kBytes - out;
}

// ---- correcting ----
//
// Header and payload are trusted no further than memory safety asks: is_readable has compared sizes, positions are
// checked, and elements beyond the end of the log's data are read as zeros.

template <class W>
W next_element(const uint8_t** p, const uint8_t* end) {
  W element = 0;
  if (end - *p < static_cast<int64_t>(sizeof(W))) return element;
  __builtin_memcpy(&element, *p, sizeof(W));
  *p += sizeof(W);
  return element;
}

template <class W>
void correct_sparse(const ChunkHeader& header, const uint8_t* payload, const uint8_t* end, int64_t count, W* w) {
  const uint8_t* full = payload + 2 * static_cast<int64_t>(header.entries);
  int64_t position = 0;
  for (int64_t i = 0; i < header.entries; ++i) {
    position += payload[2 * i];
    if (position >= count) return;
    const int8_t code = static_cast<int8_t>(payload[2 * i + 1]);
    if (code > kIsMinusZero) {
      w[position] = static_cast<W>(w[position] + static_cast<W>(code));
    } else {
      w[position] = code == kInFull ? next_element<W>(&full, end) : kMinusZero<W>;
    }
  }
}

template <class W>
void correct_bitmap(const ChunkHeader& header, const uint8_t* payload, const uint8_t* end, int64_t count, W* w) {
  uint64_t masks[kChunk / kMaskWidth];
  int8_t chosen[kChunk + 8] = {};
  alignas(64) int8_t codes[kChunk];
  masks[num_masks(count) - 1] = 0;
  __builtin_memcpy(masks, payload, bitmap_bytes(count));
  __builtin_memcpy(chosen, payload + bitmap_bytes(count), min_of<int64_t>(header.entries, kChunk));
  const int8_t* from = chosen;
  for (int64_t i = 0; i < num_masks(count); ++i)  // a mask has 64 bits: never more than kChunk codes
    from = expand(from, masks[i], codes + i * kMaskWidth);
  for (int64_t i = 0; i < count; ++i)
    w[i] = static_cast<W>(w[i] + static_cast<W>(codes[i]));
  uint16_t positions[kChunk + 4];
  const int64_t extremes = find_extremes(codes, count, positions);
  const uint8_t* full = payload + bitmap_bytes(count) + header.entries;
  for (int64_t i = 0; i < extremes; ++i) {
    W& element = w[positions[i]];
    const int8_t code = codes[positions[i]];
    if (code <= kIsMinusZero) element = code == kInFull ? next_element<W>(&full, end) : kMinusZero<W>;
  }
}

template <class W>
void correct(const ChunkHeader& header, const uint8_t* payload, const uint8_t* end, int64_t count, void* w) {
  switch (static_cast<ChunkKind>(header.kind)) {
    case ChunkKind::sparse:
      return correct_sparse(header, payload, end, count, static_cast<W*>(w));
    case ChunkKind::bitmap:
      return correct_bitmap(header, payload, end, count, static_cast<W*>(w));
    case ChunkKind::dense:
      __builtin_memcpy(w, payload, count * sizeof(W));
      return;
    default:
      return;
  }
}

// ---- checksums ----

typedef uint32_t Words32 __attribute__((vector_size(kVecBytes)));

/// Lines of 64 bytes that are summed side by side, as a sum waits for the one before; 1 without an instruction that
/// multiplies words.
#if defined(__AVX2__) || defined(__aarch64__)
constexpr int kChains = 4;
#else
constexpr int kChains = 1;
#endif

/// 31 to the power kChains.
PYLORA_INLINE Words32 next_power(Words32 v) { return kChains == 1 ? (v << 5) - v : v * (31u * 31u * 31u * 31u); }

/// Sixteen lanes, each the polynomial in 31 of the words at its place in every 64 bytes, and so of the lanes. 31 is
/// odd, so that no change of one word is lost.
uint32_t checksum(const void* data, int64_t bytes) {
  constexpr int kVectors = 64 / kVecBytes;
  const char* p = static_cast<const char*>(data);
  const auto read = [](const char* from) {
    Words32 words;
    __builtin_memcpy(&words, from, kVecBytes);
    return words;
  };
  Words32 chain[kChains][kVectors] = {};
  int64_t i = 0;
  for (; i + 64 * kChains <= bytes; i += 64 * kChains) {
#pragma GCC unroll 4
    for (int line = 0; line < kChains; ++line)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        chain[line][v] = next_power(chain[line][v]) + read(p + i + line * 64 + v * kVecBytes);
  }
  Words32 sum[kVectors] = {};
  const auto add = [&sum](int v, Words32 words) { sum[v] = (sum[v] << 5) - sum[v] + words; };
  for (int line = 0; line < kChains; ++line)
    for (int v = 0; v < kVectors; ++v)
      add(v, chain[line][v]);
  for (; i < bytes; i += 64) {
    char line[64] = {};
    __builtin_memcpy(line, p + i, min_of<int64_t>(64, bytes - i));
    for (int v = 0; v < kVectors; ++v)
      add(v, read(line + v * kVecBytes));
  }
  uint32_t lane[16], total = 0;
  __builtin_memcpy(lane, sum, sizeof lane);
  for (int j = 0; j < 16; ++j)
    total = total * 31 + lane[j];
  return total;
}

}  // namespace

extern const Codec merge_codec;
const Codec merge_codec = {{encode<uint32_t>, encode<uint16_t>, encode<uint16_t>, encode<uint64_t>},
                           {correct<uint32_t>, correct<uint16_t>, correct<uint16_t>, correct<uint64_t>},
                           checksum};

}  // namespace pylora::PYLORA_ISA
