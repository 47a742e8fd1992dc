// AVX-512 F, BW, DQ and VL. Included by vec.h alone.
#pragma once

#include <immintrin.h>

namespace pylora::PYLORA_ISA {
namespace {

PYLORA_INLINE Vec<float> load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Vec<float>)_mm512_slli_epi32(wide, 16);
}

PYLORA_INLINE Vec<float> load(const f16* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

PYLORA_INLINE void store(bf16* p, Vec<float> v) {
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, quiet)));
}

PYLORA_INLINE void store(f16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

PYLORA_INLINE void multiply_wide(U32x8 a, uint32_t b, U32x8* low, U32x8* high) {
  const __m512i product = _mm512_mul_epu32(_mm512_cvtepu32_epi64((__m256i)a), _mm512_set1_epi64(b));
  *low = (U32x8)_mm512_cvtepi64_epi32(product);
  *high = (U32x8)_mm512_cvtepi64_epi32(_mm512_srli_epi64(product, 32));
}

}  // namespace
}  // namespace pylora::PYLORA_ISA
