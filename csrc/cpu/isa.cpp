// Built without ISA flags: this must run on the oldest CPU of the architecture.
#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pylora {
namespace {

#if defined(__x86_64__)
struct CpuidRegisters {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidRegisters cpuid(unsigned leaf, unsigned subleaf = 0) {
  CpuidRegisters r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool has(unsigned bits, int first, int second = -1) {
  return (bits >> first & 1) && (second < 0 || (bits >> second & 1));
}

// XCR0: the register state that the operating system saves on a context switch.
unsigned saved_state() {
  constexpr int kOsxsave = 27;
  if (!has(cpuid(1).ecx, kOsxsave)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool x86_supported(Isa isa) {
  constexpr unsigned kYmm = 0x6, kZmm = 0xE6;
  constexpr int kFma = 12, kF16c = 29, kAvx2 = 5, kAvx512f = 16, kAvx512dq = 17, kAvx512bw = 30, kAvx512vl = 31;
  const unsigned state = saved_state(), features = cpuid(1).ecx, extended = cpuid(7).ebx;
  const bool avx2 = (state & kYmm) == kYmm && has(features, kFma, kF16c) && has(extended, kAvx2);
  if (isa == Isa::avx2) return avx2;
  return avx2 && (state & kZmm) == kZmm && has(extended, kAvx512f, kAvx512dq) && has(extended, kAvx512bw, kAvx512vl);
}
#endif

Isa best_isa() {
  Isa best = Isa::scalar;
  for (Isa isa : kAllIsas)
    if (isa_built(isa) && isa_supported(isa)) best = isa;
  return best;
}

Status find_isa(const char* name, Isa* found) {
  for (Isa isa : kAllIsas) {
    if (std::strcmp(name, isa_name(isa)) != 0) continue;
    if (!isa_built(isa))
      return invalid_argument("cpu isa: this build of pylora does not contain the instruction set asked for");
    if (!isa_supported(isa)) return unsupported("cpu isa: this CPU does not have the instruction set asked for");
    *found = isa;
    return {};
  }
  return invalid_argument("cpu isa: expected scalar, neon, avx2 or avx512");
}

struct Selection {
  std::atomic<Isa> isa{Isa::scalar};
  std::atomic<bool> chosen_by_call{false};  // after which the environment's error no longer matters
  Status environment;
  std::string environment_text;

  Selection() {
    Isa initial = best_isa();
    const char* cap = std::getenv("PYLORA_CPU_ISA");
    if (cap != nullptr && *cap != '\0') {
      environment = find_isa(cap, &initial);
      if (!environment.is_ok()) {
        environment_text = "PYLORA_CPU_ISA=" + std::string(cap) + ": " + environment.message;
        environment.message = environment_text.c_str();
      }
    }
    isa = initial;
  }
};

Selection& selection() {
  static Selection instance;
  return instance;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::neon:
      return "neon";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    default:
      return "scalar";
  }
}

bool isa_built(Isa isa) {
  switch (isa) {
#if defined(PYLORA_BUILT_SCALAR)
    case Isa::scalar:
      return true;
#endif
#if defined(PYLORA_BUILT_NEON)
    case Isa::neon:
      return true;
#endif
#if defined(PYLORA_BUILT_AVX2)
    case Isa::avx2:
      return true;
#endif
#if defined(PYLORA_BUILT_AVX512)
    case Isa::avx512:
      return true;
#endif
    default:
      return false;
  }
}

bool isa_supported(Isa isa) {
  if (isa == Isa::scalar) return true;
#if defined(__x86_64__)
  return isa != Isa::neon && x86_supported(isa);
#elif defined(__aarch64__)
  return isa == Isa::neon;
#else
  return false;
#endif
}

bool has_bf16_products() {
#if defined(__x86_64__)
  constexpr int kAvx512Bf16 = 5, kAmxBf16 = 22;
  static const bool has_them =
      x86_supported(Isa::avx512) && (has(cpuid(7, 1).eax, kAvx512Bf16) || has(cpuid(7).edx, kAmxBf16));
  return has_them;
#else
  return false;
#endif
}

bool has_f16_products() {
#if defined(__x86_64__)
  constexpr int kAvx512Fp16 = 23;
  static const bool has_them = x86_supported(Isa::avx512) && has(cpuid(7).edx, kAvx512Fp16);
  return has_them;
#else
  return false;
#endif
}

Status current_isa(Isa* isa) {
  Selection& s = selection();
  *isa = s.isa.load(std::memory_order_relaxed);
  return s.chosen_by_call.load(std::memory_order_relaxed) ? Status{} : s.environment;
}

Status set_isa(const char* name) {
  Isa isa;
  const Status status = find_isa(name, &isa);
  if (!status.is_ok()) return status;
  selection().chosen_by_call = true;
  selection().isa.store(isa, std::memory_order_relaxed);
  return {};
}

}  // namespace pylora
