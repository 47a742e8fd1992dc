#include "binding/kernel_device.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <atomic>
#include <limits>

#if defined(PYLORA_WITH_CUDA)
#include "cuda/segments.h"
#endif

namespace pylora::binding {

#if defined(PYLORA_WITH_CUDA)

bool has_code_for_gpu(c10::DeviceIndex index) {
  enum Answer : char { unknown, no, yes };
  static std::array<std::atomic<Answer>, std::numeric_limits<c10::DeviceIndex>::max() + 1> answers{};
  if (index < 0) return false;
  std::atomic<Answer>& answer = answers[static_cast<size_t>(index)];
  const Answer before = answer.load(std::memory_order_relaxed);
  if (before != unknown) return before == yes;
  if (index >= c10::impl::VirtualGuardImpl(c10::kCUDA).deviceCount()) return false;
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, index));
  const bool served = cuda::runs_here();
  answer.store(served ? yes : no, std::memory_order_relaxed);
  return served;
}

#else

bool has_code_for_gpu(c10::DeviceIndex) { return false; }

#endif

}  // namespace pylora::binding
