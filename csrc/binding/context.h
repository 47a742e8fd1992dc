// The kernels' Context from torch: its thread pool on the CPU, its current stream elsewhere.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/Device.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "common/context.h"

namespace pylora::binding {

inline Context cpu_context() {
  Context context;
  context.run_ranges = [](int64_t count, int64_t grain, RangeBody call, void* body) {
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { call(body, begin, end); });
  };
  return context;
}

/// The stream comes through c10's device-agnostic interface, so that one source builds with and without CUDA headers.
inline Context device_context(c10::Device device) {
  Context context;
  context.stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  return context;
}

}  // namespace pylora::binding
