// What threads of different blocks, and parts of a block, say to each other: atomics, release and acquire, named
// barriers. Barriers of a whole block or warp are CUDA's own __syncthreads() and __syncwarp().
#pragma once

#include "common/dtype.h"
#include "cuda/platform.cuh"

namespace pylora::cuda {

/// Relaxed; returns the old value. T: int, unsigned, float.
template <class T>
PYLORA_DEVICE T atomic_add(T* p, T value PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  return emu::atomic_add(p, value, site);
#else
  return atomicAdd(p, value);
#endif
}

/// Adds to two neighbouring 16-bit elements, packed as by pack<T>, each rounded by itself. p: a multiple of 4 bytes.
template <class T>
PYLORA_DEVICE void atomic_add_pair(T* p, uint32_t pair PYLORA_AND_SITE) {
  static_assert(sizeof(T) == 2, "pairs of 16-bit elements");
#if defined(PYLORA_EMULATE)
  emu::atomic_add_pair(p, pair, std::is_same_v<T, bf16>, site);
#else
  if constexpr (std::is_same_v<T, bf16>) {
    atomicAdd(reinterpret_cast<__nv_bfloat162*>(p), bit_cast<__nv_bfloat162>(pair));
  } else {
    atomicAdd(reinterpret_cast<__half2*>(p), bit_cast<__half2>(pair));
  }
#endif
}

/// Relaxed; the value that was there, and `desired` in its place if that was `expected`.
PYLORA_DEVICE int atomic_cas(int* p, int expected, int desired PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  return emu::atomic_cas(p, expected, desired, site);
#else
  return atomicCAS(p, expected, desired);
#endif
}

/// Adds `amount` and returns the old value. Whatever this thread wrote or, after a barrier, its block wrote is visible
/// to a thread that sees the new value through arrive() or load_acquire(); and the other way round, what arrivals
/// before this one released is visible to this thread, and after a barrier to its block.
PYLORA_DEVICE int arrive(int* counter, int amount = 1 PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  return emu::arrive(counter, amount, site);
#else
  __threadfence();
  const int before = atomicAdd(counter, amount);
  __threadfence();
  return before;
#endif
}

/// What arrive() released is visible after this, if it returns a value that arrive() has left.
PYLORA_DEVICE int load_acquire(const int* p PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  return emu::load_acquire(p, site);
#else
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
#endif
}

/// One turn of a loop that waits for another block.
PYLORA_DEVICE void spin_wait(PYLORA_SITE) {
#if defined(PYLORA_EMULATE)
  emu::spin_wait(site);
#else
  __nanosleep(20);
#endif
}

/// Barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads, a multiple of 32: arrives and waits.
PYLORA_DEVICE void barrier_sync(int id, int threads PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  emu::barrier(id, threads, true, site);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

/// Arrives without waiting.
PYLORA_DEVICE void barrier_arrive(int id, int threads PYLORA_AND_SITE) {
#if defined(PYLORA_EMULATE)
  emu::barrier(id, threads, false, site);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace pylora::cuda
