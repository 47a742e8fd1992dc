// Which devices a layer's forward uses pylora's ops on; elsewhere its modules are called.
#pragma once

#include <c10/core/Device.h>

namespace pylora::binding {

/// Whether this build has kernels that run on the GPU of this index. The driver is asked once a GPU.
bool has_code_for_gpu(c10::DeviceIndex index);

/// The CPU, and GPUs that this build has kernels for.
inline bool kernels_serve(c10::Device device) {
  return device.is_cpu() || (device.is_cuda() && has_code_for_gpu(device.index()));
}

}  // namespace pylora::binding
