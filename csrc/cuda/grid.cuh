// Launching kernels whose blocks walk a list of work: the grid depends on the GPU, not on the batch.
#pragma once

#include "cuda/device.cuh"

namespace pylora::cuda {

/// Queues `kernel` with blocks of kThreads threads for `work` pieces. The template arguments stand in the object file's
/// symbols, where tools/cuda_resources.py reads them: kMostShared is the most shared memory that the kernel asks for.
///
/// Args:
///   work: pieces that blocks take one after another; 0: nothing is launched.
///   resident: blocks a multiprocessor that are worth having.
///   shared_bytes: what this launch needs, at most kMostShared.
template <auto kernel, int kThreads, int kMostShared, class Args>
#if !defined(PYLORA_EMULATE)
__attribute__((noinline, used))
#endif
Status launch_blocks(void* stream, int64_t work, int resident, int shared_bytes, const Args& args) {
  if (work <= 0) return {};
  const int64_t most = static_cast<int64_t>(resident) * num_multiprocessors();
  const int64_t blocks = most > 0 && most < work ? most : work;
  constexpr int64_t kMostBlocks = 0x7fffffff;
  return launch<kernel>(dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)), dim3(kThreads),
                        static_cast<size_t>(shared_bytes), stream, args);
}

}  // namespace pylora::cuda
