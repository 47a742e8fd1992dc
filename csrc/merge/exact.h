// Arithmetic that is the same wherever it is compiled: explicit fused multiply-adds, one NaN for all, and the
// floating-point mode that both are defined in. Included by *.isa.cpp alone.
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
