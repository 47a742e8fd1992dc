// Why a GPU refuses a launch, in words that say what to do. Pure functions of what the runtime answered, so that they
// are tested without a GPU.
#pragma once

#include <cstddef>
#include <mutex>
#include <set>
#include <string>

namespace pylora::cuda {

enum class Refusal { no_driver, no_device, no_code, shared_memory, other };

/// What a launch met. Zeros where it is not known.
struct LaunchFacts {
  const char* said = "";       // cudaGetErrorString
  const char* built_for = "";  // architectures, "80, 90"
  int major = 0, minor = 0;    // of the current device
  size_t shared_bytes = 0;     // that a block asked for
  size_t max_shared_bytes = 0;
  int runtime_version = 0, driver_version = 0;  // 13000 is CUDA 13.0
};

inline std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

inline std::string explain(Refusal refusal, const LaunchFacts& facts) {
  const std::string architecture = "sm_" + std::to_string(facts.major) + std::to_string(facts.minor);
  switch (refusal) {
    case Refusal::no_driver:
      return "driver: expected one that runs CUDA " + cuda_version(facts.runtime_version) + ", got " +
             (facts.driver_version > 0 ? "one for CUDA " + cuda_version(facts.driver_version) : "none") + " (" +
             facts.said + ")";
    case Refusal::no_device:
      return std::string("device: expected a GPU, got none (") + facts.said + ")";
    case Refusal::no_code:
      return std::string("architecture: expected a GPU that pylora was built for (") + facts.built_for +
             ", or newer), got " + architecture + "; build it with PYLORA_CUDA_ARCHS=" + std::to_string(facts.major) +
             std::to_string(facts.minor);
    case Refusal::shared_memory:
      return "shared memory: expected at most " + std::to_string(facts.max_shared_bytes) + " bytes a block on this " +
             architecture + ", got " + std::to_string(facts.shared_bytes);
    default:
      return facts.said;
  }
}

/// The same text at an address that stays valid, as a Status needs it. There are few different ones.
inline const char* kept(const std::string& text) {
  static std::mutex mutex;
  static std::set<std::string> texts;
  const std::lock_guard<std::mutex> lock(mutex);
  return texts.insert(text).first->c_str();
}

}  // namespace pylora::cuda
