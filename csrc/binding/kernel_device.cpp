#include "binding/kernel_device.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <atomic>

#if defined(PYLORA_WITH_CUDA)
#include "cuda/segments.h"
#endif

namespace pylora::binding {

#if defined(PYLORA_WITH_CUDA)

bool has_code_for_gpu(c10::DeviceIndex index) {
  enum Answer : char { unknown, no, yes };
  static std::array<std::atomic<Answer>, 64> answers{};
  if (index < 0 || index >= c10::impl::VirtualGuardImpl(c10::kCUDA).deviceCount()) return false;
  const bool is_kept = static_cast<size_t>(index) < answers.size();
  const Answer before = is_kept ? answers[static_cast<size_t>(index)].load(std::memory_order_relaxed) : unknown;
  if (before != unknown) return before == yes;
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, index));
  const bool served = cuda::runs_here();
  if (is_kept) answers[static_cast<size_t>(index)].store(served ? yes : no, std::memory_order_relaxed);
  return served;
}

#else

bool has_code_for_gpu(c10::DeviceIndex) { return false; }

#endif

}  // namespace pylora::binding
