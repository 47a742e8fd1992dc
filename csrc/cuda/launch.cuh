// Launching: the host side of a .cu file. A launcher allocates nothing, waits for nothing and reads no device memory.
#pragma once

#include "common/status.h"
#include "cuda/platform.cuh"

namespace pylora::cuda {

/// Shared memory that a kernel gets without asking for more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

#if !defined(PYLORA_EMULATE)
inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  return {Status::Code::cuda_error, cudaGetErrorString(error)};
}
#endif

/// Multiprocessors of the current device; 0 if there is none.
inline int num_multiprocessors() {
#if defined(PYLORA_EMULATE)
  return emu::num_multiprocessors();
#else
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return count;
#endif
}

/// Dynamic shared memory that a block may have on the current device; 0 if there is none.
inline size_t max_shared_bytes() {
#if defined(PYLORA_EMULATE)
  return emu::max_shared_bytes();
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return static_cast<size_t>(bytes);
#endif
}

/// Queues kernel<<<grid, block, shared_bytes, stream>>>(args...), as `launch<kernel<T>>(...)`. The error is that of the
/// launch alone; a stream that is being captured records it.
template <auto kernel, class... Args>
Status launch(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... args) {
#if defined(PYLORA_EMULATE)
  static_cast<void>(stream);
  return emu::launch(__PRETTY_FUNCTION__, grid, block, shared_bytes, [&] { kernel(args...); });
#else
  if (shared_bytes > kDefaultSharedBytes) {
    // A call of the host alone, well under a microsecond and allowed during capture; the limit belongs to the kernel
    // and the current device.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return status_of(cudaGetLastError());
#endif
}

/// First item and step of this thread in a one-dimensional grid that walks any number of items.
PYLORA_DEVICE int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
PYLORA_DEVICE int64_t item_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

/// Blocks for `items` threads' worth of work, within a bound: the kernels stride over what is left.
inline unsigned grid_blocks(int64_t items, int threads) {
  constexpr int64_t kMostBlocks = 65535;
  const int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

}  // namespace pylora::cuda
