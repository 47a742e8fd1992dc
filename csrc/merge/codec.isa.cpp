// The undo log's payloads (README.md has the format), and checksums. A chunk's residuals become one code byte each, of
// which the nonzero ones are found 64 at a time as a mask; from there the work is per entry.
#include "merge/exact.h"
#include "merge/kernels.h"

namespace pylora::PYLORA_ISA {
namespace {

using merge::ChunkHeader;
using merge::ChunkKind;
using merge::Codec;
using merge::kChunk;

constexpr int kMaskWidth = 64;
// Both ends of the range of int8_t say that the residual follows in full width.
PYLORA_INLINE bool is_escape(int8_t code) { return (code ^ (code >> 7)) == 127; }

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
int64_t find_ones(const uint64_t* masks, int64_t count, uint16_t* out) {
  uint16_t* end = out;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t mask = masks[i];
    if (!mask) continue;
    const int ones = count_ones(mask);
    const uint16_t base = static_cast<uint16_t>(i * kMaskWidth);
    for (int j = 0; j < 4; ++j) {
      end[j] = static_cast<uint16_t>(base + (mask ? __builtin_ctzll(mask) : 0));
      mask &= mask - 1;
    }
    for (int j = 4; j < ones; ++j, mask &= mask - 1)
      end[j] = static_cast<uint16_t>(base + __builtin_ctzll(mask));
    end += ones;
  }
  return end - out;
}

/// A chunk's codes with the masks of those that are not 0.
struct Codes {
  alignas(64) int8_t code[kChunk];
  uint64_t mask[kChunk / kMaskWidth];
  int64_t masks = 0;

  template <class W>
  int64_t fill(const W* residual, int64_t count) {
    typedef typename WordOf<sizeof(W)>::Signed Signed;
    const Signed* values = reinterpret_cast<const Signed*>(residual);
    for (int64_t i = 0; i < count; ++i) {
      const Signed v = values[i] < -128 ? Signed{-128} : values[i];
      code[i] = static_cast<int8_t>(v > 127 ? Signed{127} : v);
    }
    masks = (count + kMaskWidth - 1) / kMaskWidth;
    for (int64_t i = count; i < masks * kMaskWidth; ++i)
      code[i] = 0;
    int64_t ones = 0;
    for (int64_t i = 0; i < masks; ++i) {
      mask[i] = nonzero_mask(code + i * kMaskWidth);
      ones += count_ones(mask[i]);
    }
    return ones;
  }

  /// Positions of escapes.
  int64_t find_escapes(uint16_t* out) const {
    alignas(64) int8_t flag[kChunk];
    uint64_t escapes[kChunk / kMaskWidth];
    for (int64_t i = 0; i < masks * kMaskWidth; ++i)
      flag[i] = is_escape(code[i]);
    for (int64_t i = 0; i < masks; ++i)
      escapes[i] = nonzero_mask(flag + i * kMaskWidth);
    return find_ones(escapes, masks, out);
  }
};

template <class W>
uint8_t* append_words(const W* residual, const uint16_t* positions, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i, out += sizeof(W))
    __builtin_memcpy(out, residual + positions[i], sizeof(W));
  return out;
}

template <class W>
int64_t encode_dense(const W* residual, int64_t count, ChunkHeader* header, uint8_t* out) {
  header->set(ChunkKind::dense);
  header->entries = 0;
  __builtin_memcpy(out, residual, count * sizeof(W));
  return count * static_cast<int64_t>(sizeof(W));
}

template <class W>
int64_t encode_sparse(const Codes& codes, const W* residual, int64_t ones, ChunkHeader* header, uint8_t* out) {
  uint16_t position[kChunk + 4], escape[kChunk];
  find_ones(codes.mask, codes.masks, position);
  uint8_t* end = out;
  int64_t escapes = 0;
  int last = 0;
  for (int64_t i = 0; i < ones; ++i) {
    int gap = position[i] - last;
    for (; gap > 255; gap -= 255) {
      *end++ = 255;
      *end++ = 0;
    }
    const int8_t code = codes.code[position[i]];
    *end++ = static_cast<uint8_t>(gap);
    *end++ = static_cast<uint8_t>(code);
    escape[escapes] = position[i];
    escapes += is_escape(code);
    last = position[i];
  }
  header->set(ChunkKind::sparse);
  header->entries = static_cast<uint16_t>((end - out) / 2);
  return append_words(residual, escape, escapes, end) - out;
}

template <class W>
int64_t encode_bitmap(const Codes& codes, const W* residual, int64_t count, int64_t ones, ChunkHeader* header,
                      uint8_t* out) {
  uint16_t escape[kChunk + 4];
  const int64_t escapes = codes.find_escapes(escape);
  const int64_t map_bytes = (count + 7) / 8;
  const int64_t bytes = map_bytes + ones + escapes * static_cast<int64_t>(sizeof(W));
  if (bytes >= count * static_cast<int64_t>(sizeof(W))) return encode_dense(residual, count, header, out);
  int8_t chosen[kChunk + 8];
  int8_t* end = chosen;
  for (int64_t i = 0; i < codes.masks; ++i)
    end = compress(codes.code + i * kMaskWidth, codes.mask[i], end);
  header->set(ChunkKind::bitmap);
  header->entries = static_cast<uint16_t>(ones);
  __builtin_memcpy(out, codes.mask, map_bytes);
  __builtin_memcpy(out + map_bytes, chosen, ones);
  append_words(residual, escape, escapes, out + map_bytes + ones);
  return bytes;
}

template <class W>
int64_t encode(const void* residual, int64_t count, ChunkHeader* header, uint8_t* out) {
  const W* words = static_cast<const W*>(residual);
  Codes codes;
  const int64_t ones = codes.fill(words, count);
  if (ones == 0) {
    header->set(ChunkKind::empty);
    header->entries = 0;
    return 0;
  }
  // Two bytes an entry against one and a bit for every element; escapes cost the same in both. A sparse payload of
  // 1 / 8 of the elements stays below the dense one even if every entry is an escape, but for a few elements.
  if (count >= 64 && 8 * ones < count) return encode_sparse(codes, words, ones, header, out);
  return encode_bitmap(codes, words, count, ones, header, out);
}

// Decoding trusts header and payload no further than memory safety asks: check_log has compared sizes, positions are
// taken modulo kChunk, and escapes beyond the payload's end are read as zeros.

template <class W>
W next_word(const uint8_t** p, const uint8_t* end) {
  W word = 0;
  if (end - *p < static_cast<int64_t>(sizeof(W))) return word;
  __builtin_memcpy(&word, *p, sizeof(W));
  *p += sizeof(W);
  return word;
}

template <class W>
void decode_sparse(const ChunkHeader& header, const uint8_t* payload, const uint8_t* end, int64_t count, W* residual) {
  typedef typename WordOf<sizeof(W)>::Signed Signed;
  __builtin_memset(residual, 0, count * sizeof(W));
  const uint8_t* escapes = payload + 2 * static_cast<int64_t>(header.entries);
  int64_t position = 0;
  for (int64_t i = 0; i < header.entries; ++i) {
    position += payload[2 * i];
    const int8_t code = static_cast<int8_t>(payload[2 * i + 1]);
    const W word = is_escape(code) ? next_word<W>(&escapes, end) : static_cast<W>(static_cast<Signed>(code));
    if (position < count) residual[position] = word;
  }
}

template <class W>
void decode_bitmap(const ChunkHeader& header, const uint8_t* payload, const uint8_t* end, int64_t count, W* residual) {
  typedef typename WordOf<sizeof(W)>::Signed Signed;
  const int64_t map_bytes = (count + 7) / 8;
  Codes codes;
  int8_t chosen[kChunk + 8] = {};
  codes.masks = (count + kMaskWidth - 1) / kMaskWidth;
  codes.mask[codes.masks - 1] = 0;
  __builtin_memcpy(codes.mask, payload, map_bytes);
  __builtin_memcpy(chosen, payload + map_bytes, min_of<int64_t>(header.entries, kChunk));
  const int8_t* from = chosen;
  for (int64_t i = 0; i < codes.masks; ++i)  // a mask has 64 bits: never more than kChunk codes
    from = expand(from, codes.mask[i], codes.code + i * kMaskWidth);
  for (int64_t i = 0; i < count; ++i)
    residual[i] = static_cast<W>(static_cast<Signed>(codes.code[i]));
  uint16_t escape[kChunk + 4];
  const int64_t escapes = codes.find_escapes(escape);
  const uint8_t* words = payload + map_bytes + header.entries;
  for (int64_t i = 0; i < escapes; ++i)
    if (escape[i] < count) residual[escape[i]] = next_word<W>(&words, end);
}

template <class W>
void decode(const ChunkHeader& header, const uint8_t* payload, const uint8_t* end, int64_t count, void* residual) {
  W* words = static_cast<W*>(residual);
  switch (static_cast<ChunkKind>(header.kind)) {
    case ChunkKind::sparse:
      return decode_sparse(header, payload, end, count, words);
    case ChunkKind::bitmap:
      return decode_bitmap(header, payload, end, count, words);
    case ChunkKind::dense:
      __builtin_memcpy(words, payload, count * sizeof(W));
      return;
    default:
      __builtin_memset(words, 0, count * sizeof(W));
  }
}

// ---- checksums ----

/// Sixteen lanes, each the polynomial in 31 of the words at its place in every 64 bytes, and so of the lanes. 31 is
/// odd, so that no change of one word is lost.
uint32_t checksum(const void* data, int64_t bytes) {
  typedef uint32_t Words32 __attribute__((vector_size(kVecBytes)));
  constexpr int kVectors = 64 / kVecBytes;
  const char* p = static_cast<const char*>(data);
  Words32 sum[kVectors] = {};
  const auto add = [&sum](const char* from) {
    for (int v = 0; v < kVectors; ++v) {
      Words32 words;
      __builtin_memcpy(&words, from + v * kVecBytes, kVecBytes);
      sum[v] = (sum[v] << 5) - sum[v] + words;
    }
  };
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64)
    add(p + i);
  if (i < bytes) {
    char tail[64] = {};
    __builtin_memcpy(tail, p + i, bytes - i);
    add(tail);
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
                           {decode<uint32_t>, decode<uint16_t>, decode<uint16_t>, decode<uint64_t>},
                           checksum};

}  // namespace pylora::PYLORA_ISA
