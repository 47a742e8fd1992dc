// The vectors that CPU bodies are written against, once for all instruction sets: the compiler's vector extensions
// for arithmetic, and for what these compile badly (16-bit conversions, the 32 x 32 -> 64 multiply) a header per set.
// Everything is in an anonymous namespace inside the set's own: differently compiled copies must not merge at link
// time.
#pragma once

#include "common/dtype.h"
#include "common/philox.h"

#if !defined(PYLORA_ISA)
#error "PYLORA_ISA names the instruction set's namespace; only *.isa.cpp files include this header"
#endif

#define PYLORA_INLINE static inline __attribute__((always_inline))

namespace pylora::PYLORA_ISA {
namespace {

#if defined(PYLORA_ISA_AVX512)
constexpr int kVecBytes = 64;
#elif defined(PYLORA_ISA_AVX2)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class C>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float Vec __attribute__((vector_size(kVecBytes)));
  typedef float Unaligned __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
};
template <>
struct VecTraits<double> {
  typedef double Vec __attribute__((vector_size(kVecBytes)));
  typedef double Unaligned __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
};

/// Vector of accumulators: C is float or double.
template <class C>
using Vec = typename VecTraits<C>::Vec;
template <class C>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(C));

template <class I>
constexpr I min_of(I a, I b) {
  return b < a ? b : a;
}

template <class C>
PYLORA_INLINE Vec<C> splat(C value) {
  return value - Vec<C>{};
}

PYLORA_INLINE Vec<float> load(const float* p) { return *reinterpret_cast<const VecTraits<float>::Unaligned*>(p); }
PYLORA_INLINE Vec<double> load(const double* p) { return *reinterpret_cast<const VecTraits<double>::Unaligned*>(p); }
PYLORA_INLINE void store(float* p, Vec<float> v) { *reinterpret_cast<VecTraits<float>::Unaligned*>(p) = v; }
PYLORA_INLINE void store(double* p, Vec<double> v) { *reinterpret_cast<VecTraits<double>::Unaligned*>(p) = v; }

// Each set's header defines, for bf16 and f16, rounding to nearest even and keeping NaN a NaN:
//   Vec<float> load(const bf16*), load(const f16*); void store(bf16*, Vec<float>), store(f16*, Vec<float>)
// and for eight counters at once: void multiply_wide(U32x8, uint32_t, U32x8* low, U32x8* high)
typedef uint32_t U32x8 __attribute__((vector_size(32)));

}  // namespace
}  // namespace pylora::PYLORA_ISA

#if defined(PYLORA_ISA_AVX512)
#include "cpu/simd/avx512.h"
#elif defined(PYLORA_ISA_AVX2)
#include "cpu/simd/avx2.h"
#else
#include "cpu/simd/portable.h"
#endif

namespace pylora::PYLORA_ISA {
namespace {

/// The first `count` < lanes elements, zeros after them; reads nothing beyond.
template <class T>
PYLORA_INLINE Vec<Accumulator<T>> load_partial(const T* p, int64_t count) {
  T buffer[kLanes<Accumulator<T>>] = {};
  for (int64_t i = 0; i < count; ++i)
    buffer[i] = p[i];
  return load(buffer);
}

/// Writes the first `count` < lanes elements and nothing beyond.
template <class T>
PYLORA_INLINE void store_partial(T* p, Vec<Accumulator<T>> v, int64_t count) {
  T buffer[kLanes<Accumulator<T>>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i)
    p[i] = buffer[i];
}

/// Sum of the lanes, in pairs: the same order for every call.
template <class C>
PYLORA_INLINE C horizontal_sum(Vec<C> v) {
  C lane[kLanes<C>];
  store(lane, v);
  for (int half = kLanes<C> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      lane[i] += lane[i + half];
  return lane[0];
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
