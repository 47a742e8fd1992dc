// Which instruction set the CPU kernels use: detected once, capped by PYLORA_CPU_ISA.
#pragma once

#include "common/status.h"

namespace pylora {

/// In order of preference within an architecture; scalar is the portable body in 16-byte vectors.
enum class Isa { scalar, neon, avx2, avx512 };
constexpr Isa kAllIsas[] = {Isa::scalar, Isa::neon, Isa::avx2, Isa::avx512};

const char* isa_name(Isa isa);
/// Compiled into this library.
bool isa_built(Isa isa);
/// The CPU has the instructions and the operating system saves their registers.
bool isa_supported(Isa isa);

/// The instruction set in use: the best that is built and supported, or what PYLORA_CPU_ISA or set_isa asked for.
Status current_isa(Isa* isa);
/// Switches every later launch to the named set; an error, and no change, if it is unknown, not built or not
/// supported.
Status set_isa(const char* name);

/// The CPU multiplies these types itself, so that a vendor library is fast on them (AVX512-BF16 or AMX; AVX512-FP16).
bool has_bf16_products();
bool has_f16_products();

}  // namespace pylora
