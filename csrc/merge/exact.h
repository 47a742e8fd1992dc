// Arithmetic that is the same wherever it is compiled: explicit fused multiply-adds, W's bits in the order of the
// numbers they stand for, and the floating-point mode that all of it is defined in. Included by *.isa.cpp alone.
#pragma once

#include "cpu/simd/vec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pylora::PYLORA_ISA {
namespace {

#if defined(__x86_64__) && !defined(PYLORA_ISA_AVX2) && !defined(PYLORA_ISA_AVX512)
constexpr bool kFused = false;  // this set has no such instruction, so the compiler cannot fuse either
#else
constexpr bool kFused = true;
#endif

/// a * b + c, rounded once where kFused.
template <class V>
PYLORA_INLINE V multiply_add(V a, V b, V c) {
  if constexpr (!kFused) return a * b + c;
#if defined(PYLORA_ISA_AVX512)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(PYLORA_ISA_AVX2)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  V sum;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i)
    sum[i] = sizeof(a[0]) == 4 ? __builtin_fmaf(a[i], b[i], c[i]) : __builtin_fma(a[i], b[i], c[i]);
  return sum;
#endif
}

/// The unsigned integer of T's width, and a vector of as many of them as there are accumulators in one.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  typedef uint16_t Unsigned;
  typedef int16_t Signed;
};
template <>
struct WordOf<4> {
  typedef uint32_t Unsigned;
  typedef int32_t Signed;
};
template <>
struct WordOf<8> {
  typedef uint64_t Unsigned;
  typedef int64_t Signed;
};
template <class T>
using Word = typename WordOf<sizeof(T)>::Unsigned;
template <class T>
struct WordVectors {
  static constexpr int kBytes = kLanes<Accumulator<T>> * static_cast<int>(sizeof(T));
  typedef typename WordOf<sizeof(T)>::Unsigned Unsigned __attribute__((vector_size(kBytes)));
  typedef typename WordOf<sizeof(T)>::Signed Signed __attribute__((vector_size(kBytes)));
};
template <class T>
using Words = typename WordVectors<T>::Unsigned;

template <class T>
PYLORA_INLINE Words<T> load_words(const void* p) {
  Words<T> words;
  __builtin_memcpy(&words, p, sizeof words);
  return words;
}

template <class T>
PYLORA_INLINE void store_words(void* p, Words<T> words) {
  __builtin_memcpy(p, &words, sizeof words);
}

/// The bits of the values rounded to T.
template <class T>
PYLORA_INLINE Words<T> to_words(Vec<Accumulator<T>> values) {
  T rounded[kLanes<Accumulator<T>>];
  store(rounded, values);
  return load_words<T>(rounded);
}

template <class T>
PYLORA_INLINE Vec<Accumulator<T>> to_values(Words<T> words) {
  T rounded[kLanes<Accumulator<T>>];
  store_words<T>(rounded, words);
  return load(rounded);
}

/// Values rounded to T, as bits and as accumulators again. A NaN among them is one_nan's.
template <class T>
struct Rounded {
  Words<T> words;
  Vec<Accumulator<T>> values;
};

template <class T>
PYLORA_INLINE Rounded<T> round_to(Vec<Accumulator<T>> values) {
  const Words<T> words = to_words<T>(values);
  return {words, to_values<T>(words)};
}

#if defined(PYLORA_ISA_AVX2)
/// Rounding leaves that NaN as it is, so that it needs no case of its own; and the value is there before it is packed.
template <>
inline __attribute__((always_inline)) Rounded<bf16> round_to<bf16>(Vec<float> values) {
  const __m256i bits = (__m256i)values;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i high = _mm256_srli_epi32(sum, 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  return {(Words<bf16>)packed, (Vec<float>)_mm256_and_si256(sum, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))};
}
#endif

/// Bits of T to signed integers in the order of the numbers (-0 just below +0), as unsigned; its own inverse.
template <class T>
PYLORA_INLINE Words<T> in_order(Words<T> words) {
  typedef typename WordVectors<T>::Signed Signed;
  const Signed sign = (Signed)words >> static_cast<int>(8 * sizeof(T) - 1);
  return words ^ ((Words<T>)sign >> 1);
}

/// Every NaN becomes the same one: which of two NaNs an operation returns differs between instruction sets.
PYLORA_INLINE Vec<float> one_nan(Vec<float> v) {
  typedef int32_t Mask __attribute__((vector_size(kVecBytes)));
  const Mask ordered = v == v;
  return (Vec<float>)(((Mask)v & ordered) | (~ordered & 0x7fc00000));
}
PYLORA_INLINE Vec<double> one_nan(Vec<double> v) {
  typedef int64_t Mask __attribute__((vector_size(kVecBytes)));
  const Mask ordered = v == v;
  return (Vec<double>)(((Mask)v & ordered) | (~ordered & 0x7ff8000000000000));
}

/// Rounding to nearest, subnormals kept: torch.set_flush_denormal and the like are per thread, and taking out may run
/// on another one.
class PlainFloatingPoint {
 public:
#if defined(__x86_64__)
  PlainFloatingPoint() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~PlainFloatingPoint() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  PlainFloatingPoint() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~PlainFloatingPoint() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  PlainFloatingPoint() {}
#endif
};

}  // namespace
}  // namespace pylora::PYLORA_ISA
