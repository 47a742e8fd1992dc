// mma and ldmatrix. All lanes of a warp take part. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 with
// floating point type" and its neighbours; tests/emu holds the emulator's to formulas taken from there.
#pragma once

#include "common/dtype.h"
#include "cuda/memory.cuh"

namespace pylora::cuda {

/// d += a b with f32 sums. a [16, 16] row-major, b [16, 8] column-major, of T = bf16 or f16. With g = lane / 4 and
/// t = lane % 4, a holds the pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), b holds (2t, g), (2t + 8, g)
/// and d the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
PYLORA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PYLORA_AND_SITE) {
  static_assert(sizeof(T) == 2, "bf16 or f16");
#if defined(PYLORA_EMULATE)
  emu::mma(d, a, b, std::is_same_v<T, bf16> ? emu::MmaKind::bf16 : emu::MmaKind::f16, site);
#else
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

/// d += a b with a [16, 8] and b [8, 8] of to_tf32 values: a holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), b
/// holds (t, g), (t + 4, g), d as above.
PYLORA_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  emu::mma(d, a, b, emu::MmaKind::tf32, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/// Loads N (1, 2 or 4) 8 x 8 matrices of 16-bit elements. Lane 8 i + j gives the shared address of row j of matrix i,
/// a multiple of 16 bytes; addresses of lanes from 8 N on are not read. r[i] of lane l is the pair (l / 4, 2 (l % 4))
/// of matrix i, Transposed: the pair of its transpose.
template <int N, bool Transposed>
PYLORA_DEVICE void load_matrices(uint32_t (&r)[N], const void* row PYLORA_AND_SITE) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
#if defined(PYLORA_EMULATE)
  emu::ldmatrix(r, row, N, Transposed, site);
#else
  const uint32_t address = shared_address(row);
#define PYLORA_LDMATRIX(suffix, registers, ...)                                  \
  asm volatile("ldmatrix.sync.aligned.m8n8." suffix ".shared.b16 " registers ";" \
               : __VA_ARGS__                                                     \
               : "r"(address)                                                    \
               : "memory")
  if constexpr (N == 1 && !Transposed) {
    PYLORA_LDMATRIX("x1", "{%0}, [%1]", "=r"(r[0]));
  } else if constexpr (N == 1) {
    PYLORA_LDMATRIX("x1.trans", "{%0}, [%1]", "=r"(r[0]));
  } else if constexpr (N == 2 && !Transposed) {
    PYLORA_LDMATRIX("x2", "{%0,%1}, [%2]", "=r"(r[0]), "=r"(r[1]));
  } else if constexpr (N == 2) {
    PYLORA_LDMATRIX("x2.trans", "{%0,%1}, [%2]", "=r"(r[0]), "=r"(r[1]));
  } else if constexpr (!Transposed) {
    PYLORA_LDMATRIX("x4", "{%0,%1,%2,%3}, [%4]", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]));
  } else {
    PYLORA_LDMATRIX("x4.trans", "{%0,%1,%2,%3}, [%4]", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]));
  }
#undef PYLORA_LDMATRIX
#endif
}

template <int N>
PYLORA_DEVICE void ldmatrix(uint32_t (&r)[N], const void* row PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  load_matrices<N, false>(r, row, site);
#else
  load_matrices<N, false>(r, row);
#endif
}

template <int N>
PYLORA_DEVICE void ldmatrix_transposed(uint32_t (&r)[N], const void* row PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  load_matrices<N, true>(r, row, site);
#else
  load_matrices<N, true>(r, row);
#endif
}

}  // namespace pylora::cuda
