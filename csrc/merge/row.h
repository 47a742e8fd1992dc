// One row of a tile of W, two vectors of accumulators wide: its bits as they lie in memory, their values, rounding, and
// the codes of the undo log. Included by *.isa.cpp alone.
#pragma once

#include "merge/exact.h"

namespace pylora::PYLORA_ISA {
namespace {

constexpr int kTileVectors = 2;
template <class C>
constexpr int kTile = kTileVectors * kLanes<C>;

/// The accumulators of a row: columns 0, 1, ... of the tile, in the order of column_at.
template <class C>
struct Pair {
  Vec<C> v[kTileVectors];
};

// ---- codes: differences of bits, clamped to int8_t ----

template <class V>
PYLORA_INLINE void store_clamped(int8_t* out, V difference) {
  constexpr int kCount = sizeof(V) / sizeof(difference[0]);
  for (int i = 0; i < kCount; ++i) {
    const auto low = difference[i] < -128 ? -128 : difference[i];
    out[i] = static_cast<int8_t>(low > 127 ? 127 : low);
  }
}

/// The codes of a row from the differences of its two vectors, signed integers of 16, 32 or 64 bits.
template <class V>
PYLORA_INLINE void store_codes(int8_t* out, V first, V second) {
  [[maybe_unused]] constexpr int kBits = 8 * sizeof(first[0]);
#if defined(PYLORA_ISA_AVX512)
  if constexpr (kBits == 32) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8((__m512i)first));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm512_cvtsepi32_epi8((__m512i)second));
    return;
  } else if constexpr (kBits == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtsepi16_epi8((__m256i)first));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm256_cvtsepi16_epi8((__m256i)second));
    return;
  }
#elif defined(PYLORA_ISA_AVX2)
  if constexpr (kBits == 32) {
    const __m256i half = _mm256_packs_epi32((__m256i)first, (__m256i)second);  // 0-3 8-11 | 4-7 12-15
    const __m128i codes = _mm_packs_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi32(codes, _MM_SHUFFLE(3, 1, 2, 0)));
    return;
  } else if constexpr (kBits == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packs_epi16((__m128i)first, (__m128i)second));
    return;
  }
#endif
  store_clamped(out, first);
  store_clamped(out + sizeof(V) / sizeof(first[0]), second);
}

// ---- rows ----

template <int kBytes>
struct IntegerOf;
template <>
struct IntegerOf<2> {
  typedef uint16_t Unsigned;
  typedef int16_t Signed;
};
template <>
struct IntegerOf<4> {
  typedef uint32_t Unsigned;
  typedef int32_t Signed;
};
template <>
struct IntegerOf<8> {
  typedef uint64_t Unsigned;
  typedef int64_t Signed;
};

/// f32, f16 and f64.
template <class T>
struct Row {
  using C = Accumulator<T>;
  static constexpr int kBytes = kLanes<C> * static_cast<int>(sizeof(T));
  typedef typename IntegerOf<sizeof(T)>::Unsigned Words __attribute__((vector_size(kBytes)));
  typedef typename IntegerOf<sizeof(T)>::Signed Differences __attribute__((vector_size(kBytes)));

  Words words[kTileVectors];

  /// Where a column of the tile is among a row's accumulators.
  static constexpr int place_of(int column) { return column; }

  static __attribute__((always_inline)) Row read(const T* p) {
    Row row;
    for (int n = 0; n < kTileVectors; ++n)  // of both at once GCC makes four copies of 16 bytes
      __builtin_memcpy(&row.words[n], p + n * kLanes<C>, kBytes);
    return row;
  }

  __attribute__((always_inline)) void write(T* p) const {
    for (int n = 0; n < kTileVectors; ++n)
      __builtin_memcpy(p + n * kLanes<C>, &words[n], kBytes);
  }

  __attribute__((always_inline)) Pair<C> values() const {
    Pair<C> pair;
    for (int n = 0; n < kTileVectors; ++n) {
      if constexpr (sizeof(T) == sizeof(C)) {
        pair.v[n] = (Vec<C>)words[n];
      } else {
        T lane[kLanes<C>];
        __builtin_memcpy(lane, &words[n], kBytes);
        pair.v[n] = load(lane);
      }
    }
    return pair;
  }

  /// Rounded to T.
  static __attribute__((always_inline)) Row round(const Pair<C>& pair) {
    Row row;
    for (int n = 0; n < kTileVectors; ++n) {
      if constexpr (sizeof(T) == sizeof(C)) {
        row.words[n] = (Words)pair.v[n];
      } else {
        T lane[kLanes<C>];
        store(lane, pair.v[n]);
        __builtin_memcpy(&row.words[n], lane, kBytes);
      }
    }
    return row;
  }

  /// As taking out rounds.
  static __attribute__((always_inline)) Row round_back(const Pair<C>& pair) { return round(pair); }

  /// The codes that turn `back` into this row.
  __attribute__((always_inline)) void write_codes(const Row& back, int8_t* out) const {
    store_codes(out, (Differences)(words[0] - back.words[0]), (Differences)(words[1] - back.words[1]));
  }
};

/// Two elements lie in a 32-bit word: the even columns are one vector and the odd ones the other, so that widening is a
/// shift and a mask, and nothing changes its place. A NaN has to be one_nan's before it is rounded.
template <>
struct Row<bf16> {
  typedef uint32_t Words __attribute__((vector_size(kVecBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kVecBytes)));
  typedef int16_t Differences __attribute__((vector_size(kVecBytes / 2)));

  Words words;

  static constexpr int place_of(int column) { return column % 2 * kLanes<float> + column / 2; }

  static __attribute__((always_inline)) Row read(const bf16* p) {
    Row row;
    __builtin_memcpy(&row.words, p, sizeof row.words);
    return row;
  }

  __attribute__((always_inline)) void write(bf16* p) const { __builtin_memcpy(p, &words, sizeof words); }

  __attribute__((always_inline)) Pair<float> values() const {
    return {(Vec<float>)(words << 16), (Vec<float>)(words & kHigh)};
  }

  static __attribute__((always_inline)) Row round(const Pair<float>& pair) {
    const Words even = (Words)pair.v[0], odd = (Words)pair.v[1];
#if defined(PYLORA_ISA_AVX2)
    // Sixteen at once: the lower halves say whether to add 1 to the upper ones, those of even ones only beyond a tie.
    const __m256i high = _mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
    const __m256i low = _mm256_blend_epi16((__m256i)even, (__m256i)(odd << 16), 0xaa);
    const __m256i is_even = _mm256_andnot_si256(high, _mm256_set1_epi16(1));
    return {(Words)_mm256_add_epi16(high, _mm256_srli_epi16(_mm256_subs_epu16(low, is_even), 15))};
#else
    return pack(even + 0x7fff + (even >> 16 & 1), odd + 0x7fff + (odd >> 16 & 1));
#endif
  }

  /// Ties away from zero, which is an addition.
  static __attribute__((always_inline)) Row round_back(const Pair<float>& pair) {
    return pack((Words)pair.v[0] + 0x8000, (Words)pair.v[1] + 0x8000);
  }

  __attribute__((always_inline)) void write_codes(const Row& back, int8_t* out) const {
    const Halves difference = (Halves)words - (Halves)back.words;
    Differences half[2];
    __builtin_memcpy(half, &difference, sizeof half);
    store_codes(out, half[0], half[1]);
  }

 private:
  static constexpr uint32_t kHigh = 0xffff0000u;

  static __attribute__((always_inline)) Row pack(Words even, Words odd) {
#if defined(PYLORA_ISA_AVX2)
    return {(Words)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa)};
#else
    return {even >> 16 | (odd & kHigh)};
#endif
  }
};

}  // namespace
}  // namespace pylora::PYLORA_ISA
