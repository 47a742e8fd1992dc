// Global memory and cp.async. Every access of a kernel to global memory is one of these calls: they choose the
// instruction, and the emulator checks and counts them. V is any trivially copyable type of 1, 2, 4, 8 or 16 bytes
// (uint4, float4, bf16, a struct of four ints); its address has to be a multiple of that size.
#pragma once

#include "cuda/platform.cuh"

namespace pylora::cuda {

/// The type that one load or store instruction moves.
template <size_t Bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <class V>
using WordOf = typename Word<sizeof(V)>::type;

/// Data that no thread of this launch writes (ld.global.nc).
template <class V>
PYLORA_DEVICE V load_readonly(const void* p PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  return emu::load<V>(p, emu::LoadKind::readonly, site);
#else
  return bit_cast<V>(__ldg(static_cast<const WordOf<V>*>(p)));
#endif
}

/// The same where all lanes of a warp read one address. Counted once a warp.
template <class V>
PYLORA_DEVICE V load_uniform(const void* p PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  return emu::load<V>(p, emu::LoadKind::uniform, site);
#else
  return bit_cast<V>(__ldg(static_cast<const WordOf<V>*>(p)));
#endif
}

/// Read-only data that the launch reads once: it is the first to leave the caches (ld.global.cs).
template <class V>
PYLORA_DEVICE V load_streaming(const void* p PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  return emu::load<V>(p, emu::LoadKind::readonly, site);
#else
  return bit_cast<V>(__ldcs(static_cast<const WordOf<V>*>(p)));
#endif
}

/// Data that this block alone writes, for instance a tensor updated in place (ld.global).
template <class V>
PYLORA_DEVICE V load_global(const void* p PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  return emu::load<V>(p, emu::LoadKind::own, site);
#else
  return bit_cast<V>(*static_cast<const WordOf<V>*>(p));
#endif
}

/// Data that another block of this launch has written, and released (sync.cuh): from L2 (ld.global.cg).
template <class V>
PYLORA_DEVICE V load_coherent(const void* p PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  return emu::load<V>(p, emu::LoadKind::coherent, site);
#else
  return bit_cast<V>(__ldcg(static_cast<const WordOf<V>*>(p)));
#endif
}

template <class V>
PYLORA_DEVICE void store_global(void* p, V value PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  emu::store(p, value, site);
#else
  *static_cast<WordOf<V>*>(p) = bit_cast<WordOf<V>>(value);
#endif
}

#if !defined(PYLORA_EMULATE)
PYLORA_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

/// Starts a copy of `valid_bytes` bytes (0 to Bytes) from global to shared memory and fills the rest of Bytes with
/// zeros. Both addresses are multiples of Bytes, and the global one is a valid address even where valid_bytes is 0.
/// The data is there for this thread after cp_async_wait, for others after a barrier that follows. Own: this block will
/// write where the data comes from, once it is there; else no thread of the launch does.
template <int Bytes, bool Own = false>
PYLORA_DEVICE void cp_async(void* shared, const void* global, int valid_bytes = Bytes PYLORA_AND_SITE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(PYLORA_EMULATE)
  emu::cp_async(shared, global, Bytes, valid_bytes, Own ? emu::LoadKind::own : emu::LoadKind::readonly, site);
#else
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(valid_bytes)
                 : "memory");
  }
#endif
}

/// Ends this thread's current group of copies.
PYLORA_DEVICE void cp_async_commit() {
#if defined(PYLORA_EMULATE)
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits for this thread's groups but the `Pending` latest.
template <int Pending>
PYLORA_DEVICE void cp_async_wait() {
#if defined(PYLORA_EMULATE)
  emu::cp_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace pylora::cuda
