# Compiles every csrc/<op>/*.isa.cpp once per instruction set and tells the rest of the library which sets exist.
# In such a file PYLORA_ISA is the set's name (a namespace) and PYLORA_ISA_<NAME> is 1. Nothing else gets ISA flags:
# code that runs before the CPU was asked must run on every CPU.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(PYLORA_ISAS scalar avx2 avx512)
  # A -march in the environment's CXXFLAGS must not reach the body that is there for the oldest CPU.
  set(PYLORA_ISA_FLAGS_scalar -mno-avx)
  set(PYLORA_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(PYLORA_ISA_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  # NEON is part of the aarch64 baseline; the scalar body stays as the one to compare with.
  set(PYLORA_ISAS scalar neon)
  set(PYLORA_ISA_FLAGS_scalar)
  set(PYLORA_ISA_FLAGS_neon)
else()
  set(PYLORA_ISAS scalar)
  set(PYLORA_ISA_FLAGS_scalar)
endif()

file(GLOB PYLORA_ISA_SOURCES CONFIGURE_DEPENDS ${PYLORA_CSRC}/*/*.isa.cpp)

foreach(isa IN LISTS PYLORA_ISAS)
  string(TOUPPER ${isa} isa_upper)
  target_compile_definitions(pylora_kernels PRIVATE PYLORA_BUILT_${isa_upper}=1)
  if(PYLORA_ISA_SOURCES)
    add_library(pylora_isa_${isa} OBJECT ${PYLORA_ISA_SOURCES})
    target_link_libraries(pylora_isa_${isa} PRIVATE pylora_flags)
    # GCC fuses a*b+c in C++ by default and Clang only within an expression: say it, so that both give the same code.
    target_compile_options(pylora_isa_${isa} PRIVATE ${PYLORA_ISA_FLAGS_${isa}} -ffp-contract=fast
      # Nothing throws here, and a destructor's way out of an exception leaves a symbol that all sets share.
      -fno-exceptions
      # GCC's own intrinsics headers start from deliberately uninitialised registers.
      $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized -Wno-maybe-uninitialized>)
    target_compile_definitions(pylora_isa_${isa} PRIVATE PYLORA_ISA=${isa} PYLORA_ISA_${isa_upper}=1)
    target_sources(pylora_kernels PRIVATE $<TARGET_OBJECTS:pylora_isa_${isa}>)
  endif()
endforeach()
