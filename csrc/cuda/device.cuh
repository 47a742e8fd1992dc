// What every .cu file includes: element conversions, the grid-stride range, and launch errors as a Status.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/dtype.h"
#include "common/status.h"

namespace pylora::cuda {

/// The device's own type of a storage type: same bits, with conversions in hardware.
template <class T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<bf16> {
  using type = __nv_bfloat16;
};
template <>
struct DeviceType<f16> {
  using type = __half;
};

template <class T>
__device__ Accumulator<T> load(const T* p) {
  using D = typename DeviceType<T>::type;
  return static_cast<Accumulator<T>>(*reinterpret_cast<const D*>(p));
}

/// Rounds to nearest even.
template <class T>
__device__ void store(T* p, Accumulator<T> value) {
  using D = typename DeviceType<T>::type;
  *reinterpret_cast<D*>(p) = static_cast<D>(value);
}

/// First item and step of this thread in a one-dimensional grid that walks any number of items.
__device__ inline int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t item_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

/// Blocks for `items` threads' worth of work, within a bound: the kernels stride over what is left.
inline unsigned grid_blocks(int64_t items, int threads) {
  constexpr int64_t kMostBlocks = 65535;
  const int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

/// The error of the launch just made, if any. Never waits for the device.
inline Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {Status::Code::cuda_error, cudaGetErrorString(error)};
}

}  // namespace pylora::cuda
