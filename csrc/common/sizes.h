// Sizes that every launcher shares: the alignment of workspaces, and the work that a thread is worth waking for.
#pragma once

#include <cstdint>

namespace pylora {

constexpr int64_t kWorkspaceAlignment = 64;

constexpr int64_t align_up(int64_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

/// Least work of a thread, in multiply-adds: waking a thread costs about 5 us, in which one does about 200,000.
constexpr int64_t kGrainWork = 200000;

constexpr int64_t grain(int64_t work_per_item) { return work_per_item > 0 ? 1 + kGrainWork / work_per_item : 1; }

}  // namespace pylora
