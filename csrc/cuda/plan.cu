// plan_segments: the list of items, once a batch. One block scans the segments.
#include "cuda/segments.cuh"

namespace pylora::cuda {
namespace {

constexpr int kPlanThreads = 256;

/// Segments 256 at a time: a thread counts the items of its segment, the block adds the counts up from left to right, and
/// each thread writes its items.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const PlanArgs args) {
  int* const sums = shared_memory<int>();  // [kPlanThreads]
  const int tid = threadIdx.x;
  int base = 0;  // items of the segments before
  for (int64_t first = 0; first < args.num_segments; first += kPlanThreads) {
    const int64_t segment = first + tid;
    int begin = 0, end = 0, slot = -1;
    if (segment < args.num_segments) {
      begin = load_readonly<int32_t>(args.indptr + segment);
      end = load_readonly<int32_t>(args.indptr + segment + 1);
      slot = load_readonly<int32_t>(args.slots + segment);
    }
    const int count = slot < 0 || end <= begin ? 0 : (end - begin + kItemRows - 1) / kItemRows;
    sums[tid] = count;
    for (int step = 1; step < kPlanThreads; step *= 2) {  // Hillis and Steele's scan
      __syncthreads();
      const int left = tid >= step ? sums[tid - step] : 0;
      __syncthreads();
      sums[tid] += left;
    }
    __syncthreads();
    int item = base + sums[tid] - count;
    base += sums[kPlanThreads - 1];
    for (int row = begin; row < end && count > 0; row += kItemRows)
      store_global(args.items + item++, Item{row, min_of(kItemRows, end - row), slot, 0});
    __syncthreads();  // sums have been read
  }
  if (tid == 0) store_global(args.num_items, base);
}

}  // namespace

Status plan_segments(const Context& context, const PlanArgs& args) {
  return launch_blocks<plan_kernel, kPlanThreads, kPlanThreads * sizeof(int)>(
      context.stream, 1, 1, kPlanThreads * static_cast<int>(sizeof(int)), args);
}

}  // namespace pylora::cuda
