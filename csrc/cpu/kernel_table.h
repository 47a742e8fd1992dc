// An op's kernels exist once per instruction set, as `pylora::<isa>::<name>`: a constant table of function pointers
// that its *.isa.cpp defines. PYLORA_KERNEL_TABLE(Type, name) declares them and defines name##_table(Isa).
#pragma once

#include "cpu/isa.h"

#if defined(PYLORA_BUILT_NEON)
#define PYLORA_IF_NEON(...) __VA_ARGS__
#else
#define PYLORA_IF_NEON(...)
#endif
#if defined(PYLORA_BUILT_AVX2)
#define PYLORA_IF_AVX2(...) __VA_ARGS__
#else
#define PYLORA_IF_AVX2(...)
#endif
#if defined(PYLORA_BUILT_AVX512)
#define PYLORA_IF_AVX512(...) __VA_ARGS__
#else
#define PYLORA_IF_AVX512(...)
#endif

// To be used at namespace scope, outside any namespace. isa.cpp never selects a set that is not built.
#define PYLORA_KERNEL_TABLE(Type, name)                          \
  namespace pylora {                                             \
  namespace scalar {                                             \
  extern const Type name;                                        \
  }                                                              \
  PYLORA_IF_NEON(namespace neon { extern const Type name; })     \
  PYLORA_IF_AVX2(namespace avx2 { extern const Type name; })     \
  PYLORA_IF_AVX512(namespace avx512 { extern const Type name; }) \
  inline const Type& name##_table(Isa isa) {                     \
    switch (isa) {                                               \
      PYLORA_IF_NEON(case Isa::neon : return neon::name;)        \
      PYLORA_IF_AVX2(case Isa::avx2 : return avx2::name;)        \
      PYLORA_IF_AVX512(case Isa::avx512 : return avx512::name;)  \
      default:                                                   \
        return scalar::name;                                     \
    }                                                            \
  }                                                              \
  }
