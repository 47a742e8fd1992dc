// Launching: the host side of a .cu file. A launcher allocates nothing, waits for nothing and reads no device memory.
#pragma once

#include "common/status.h"
#include "cuda/platform.cuh"
#include "cuda/refusals.h"

namespace pylora::cuda {

/// Shared memory that a kernel gets without asking for more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

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

#if !defined(PYLORA_EMULATE)
inline Refusal refusal_of(cudaError_t error, size_t shared_bytes) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
      return Refusal::no_driver;
    case cudaErrorNoDevice:
      return Refusal::no_device;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx:
      return Refusal::no_code;
    default:
      return shared_bytes > max_shared_bytes() && max_shared_bytes() > 0 ? Refusal::shared_memory : Refusal::other;
  }
}

/// The answer of a launch that asked for `shared_bytes` of dynamic shared memory.
inline Status status_of(cudaError_t error, size_t shared_bytes) {
  if (error == cudaSuccess) return {};
  LaunchFacts facts;
  int device = 0;
  // Their own failures say nothing new: what could not be found out stays zero.
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&facts.major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&facts.minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  cudaRuntimeGetVersion(&facts.runtime_version);
  cudaDriverGetVersion(&facts.driver_version);
  facts.said = cudaGetErrorString(error);
  facts.built_for = PYLORA_CUDA_ARCHS;
  facts.shared_bytes = shared_bytes;
  facts.max_shared_bytes = max_shared_bytes();
  return {Status::Code::cuda_error, kept(explain(refusal_of(error, shared_bytes), facts))};
}
#endif

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
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would be blamed for it
      return status_of(error, shared_bytes);
    }
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return status_of(cudaGetLastError(), shared_bytes);
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
