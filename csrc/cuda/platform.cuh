// What a kernel is compiled against: CUDA under nvcc, the emulator (csrc/emu) under any C++ compiler that defines
// PYLORA_EMULATE. Both give the names of CUDA C++ itself: threadIdx, blockDim, dim3, uint4, __syncthreads(),
// __syncwarp(), __shfl_*_sync(), __ballot_sync(), __popc(), __fmul_rn() and their like (emu/cuda_names.h lists them).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(PYLORA_EMULATE)
#include "emu/cuda_names.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

/// The last parameter of a wrapper that the emulator may have to report: where it was called.
#if defined(PYLORA_EMULATE)
#define PYLORA_SITE ::pylora::emu::Site site = ::pylora::emu::Site::here()
#define PYLORA_AND_SITE , ::pylora::emu::Site site = ::pylora::emu::Site::here()
#else
#define PYLORA_SITE
#define PYLORA_AND_SITE
#endif

#define PYLORA_DEVICE __device__ __forceinline__

namespace pylora::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

/// The same bytes as another type of the same size.
template <class To, class From>
PYLORA_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

/// The block's dynamic shared memory as elements of T, from `byte_offset` on. It starts at a multiple of 128 bytes.
/// Kernels use no static shared memory: the emulator checks the bounds of what the launch asked for.
template <class T>
PYLORA_DEVICE T* shared_memory(size_t byte_offset = 0) {
#if defined(PYLORA_EMULATE)
  unsigned char* const bytes = emu::shared_memory();
#else
  extern __shared__ __align__(128) unsigned char bytes[];
#endif
  return reinterpret_cast<T*>(bytes + byte_offset);
}

PYLORA_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
PYLORA_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

}  // namespace pylora::cuda
