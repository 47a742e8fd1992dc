// plan_segments and group_rows: the list of items of a batch, made on the device by one block. send: what the host knows.
#include "cuda/segments.cuh"

namespace pylora::cuda {
namespace {

constexpr int kPlanThreads = 256, kPlanWarps = kPlanThreads / kWarpSize;

/// The sum of the threads' counts up to this thread's own, and of all. sums: shared, [kPlanThreads].
struct Scan {
  int before, all;
};

PYLORA_DEVICE Scan scan_block(int count, int* sums) {
  const int tid = threadIdx.x;
  sums[tid] = count;
  for (int step = 1; step < kPlanThreads; step *= 2) {  // Hillis and Steele's scan
    __syncthreads();
    const int left = tid >= step ? sums[tid - step] : 0;
    __syncthreads();
    sums[tid] += left;
  }
  __syncthreads();
  const Scan scan{sums[tid] - count, sums[kPlanThreads - 1]};
  __syncthreads();  // sums have been read
  return scan;
}

/// Positions [begin, end) of a slot as items from `item` on.
PYLORA_DEVICE void write_items(const PlanArgs& args, int64_t begin, int64_t end, int slot, int64_t item) {
  for (int64_t row = begin; row < end && item < args.max_items; row += args.item_rows) {
    const int left = static_cast<int>(end - row);
    store_global(args.items + item++, Item{static_cast<int32_t>(row), min_of(args.item_rows, left), slot, 0});
  }
}

PYLORA_DEVICE int items_of(const PlanArgs& args, int64_t rows) {
  return static_cast<int>((rows + args.item_rows - 1) / args.item_rows);
}

/// Never more than there is room for.
PYLORA_DEVICE void write_count(const PlanArgs& args, int64_t count) {
  if (threadIdx.x == 0)
    store_global(args.num_items, static_cast<int32_t>(count < args.max_items ? count : args.max_items));
}

PYLORA_DEVICE bool is_slot(const PlanArgs& args, int slot) { return slot >= 0 && slot < args.num_slots; }

/// Segments 256 at a time: a thread counts the items of its segment, the block adds the counts up from left to right, and
/// each thread writes its items.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const PlanArgs args) {
  int* const sums = shared_memory<int>();  // [kPlanThreads]
  int64_t base = 0;                        // items of the segments before
  for (int64_t first = 0; first < args.num_segments; first += kPlanThreads) {
    const int64_t segment = first + threadIdx.x;
    int64_t begin = 0, end = 0;
    int slot = -1;
    if (segment < args.num_segments) {
      begin = load_readonly<int32_t>(args.indptr + segment) * args.tokens_per_row;
      end = load_readonly<int32_t>(args.indptr + segment + 1) * args.tokens_per_row;
      slot = load_readonly<int32_t>(args.slots + segment);
    }
    if (begin < 0) begin = 0;
    if (end > args.num_rows) end = args.num_rows;
    if (!is_slot(args, slot) || end < begin) end = begin;
    const Scan scan = scan_block(items_of(args, end - begin), sums);
    write_items(args, begin, end, slot, base + scan.before);
    base += scan.all;
  }
  write_count(args, base);
  if (!args.rows) return;
  for (int64_t p = threadIdx.x; p < args.num_rows; p += kPlanThreads) {
    const int64_t sequence = load_readonly<int32_t>(args.order + p / args.tokens_per_row);
    store_global(args.rows + p, static_cast<int32_t>(sequence * args.tokens_per_row + p % args.tokens_per_row));
  }
}

/// Lanes whose slot is this lane's.
PYLORA_DEVICE unsigned lanes_alike(int slot) {
  unsigned lanes = 0;
#pragma unroll
  for (int lane = 0; lane < kWarpSize; ++lane)
    lanes |= static_cast<unsigned>(__shfl_sync(kAllLanes, slot, lane) == slot) << lane;
  return lanes;
}

/// Places the rows of a warp behind those that were placed before, in their order.
PYLORA_DEVICE void place_rows(const PlanArgs& args, int64_t row, int slot) {
  const unsigned alike = lanes_alike(slot);
  const int before = __popc(alike & ((1u << lane_id()) - 1));
  const int start = slot >= 0 ? load_global<int32_t>(args.starts + slot) : 0;
  __syncwarp();  // all have read where their slot's rows begin
  if (slot < 0) return;
  store_global(args.rows + start + before, static_cast<int32_t>(row));
  if (before == 0) store_global(args.starts + slot, start + __popc(alike));
}

/// A counting sort: rows of each slot are counted, the counts added up from slot to slot, and the warps take turns to place
/// their rows, so that those of a slot stay in order.
__global__ void __launch_bounds__(kPlanThreads) group_kernel(const PlanArgs args) {
  int* const sums = shared_memory<int>();  // [kPlanThreads]
  for (int64_t slot = threadIdx.x; slot < args.num_slots; slot += kPlanThreads)
    store_global(args.starts + slot, 0);
  __syncthreads();
  for (int64_t row = threadIdx.x; row < args.num_rows; row += kPlanThreads) {
    const int slot = load_readonly<int32_t>(args.slots + row);
    if (is_slot(args, slot)) atomic_add(args.starts + slot, 1);
  }
  __syncthreads();
  int64_t rows = 0, items = 0;  // of the slots before
  for (int64_t first = 0; first < args.num_slots; first += kPlanThreads) {
    const int64_t slot = first + threadIdx.x;
    const int count = slot < args.num_slots ? load_global<int32_t>(args.starts + slot) : 0;
    const Scan of_rows = scan_block(count, sums), of_items = scan_block(items_of(args, count), sums);
    const int64_t begin = rows + of_rows.before;
    write_items(args, begin, begin + count, static_cast<int>(slot), items + of_items.before);
    if (slot < args.num_slots) store_global(args.starts + slot, static_cast<int32_t>(begin));
    rows += of_rows.all;
    items += of_items.all;
  }
  write_count(args, items);
  for (int64_t first = 0; first < args.num_rows; first += kPlanThreads) {
    const int64_t row = first + threadIdx.x;
    const int given = row < args.num_rows ? load_readonly<int32_t>(args.slots + row) : -1;
    for (int warp = 0; warp < kPlanWarps && first + warp * kWarpSize < args.num_rows; ++warp) {
      __syncthreads();  // the rows before have been placed
      if (warp == warp_id()) place_rows(args, row, is_slot(args, given) ? given : -1);
    }
  }
}

__global__ void __launch_bounds__(kPlanThreads) send_kernel(const Parcel parcel) {
  constexpr int kBytes = static_cast<int>(sizeof(uint4));
  if (blockIdx.x == 0)
    for (int64_t i = threadIdx.x * kBytes; i < parcel.bytes; i += kPlanThreads * kBytes)
      store_global(static_cast<char*>(parcel.to) + i, *reinterpret_cast<const uint4*>(parcel.data + i));
  for (int64_t i = first_item(); i < parcel.num_zeros; i += item_step())
    store_global(parcel.zeros + i, 0);
}

template <auto kernel>
Status launch_block(const Context& context, const PlanArgs& args) {
  constexpr int kShared = kPlanThreads * static_cast<int>(sizeof(int));
  return launch_blocks<kernel, kPlanThreads, kShared>(context.stream, 1, 1, kShared, args);
}

}  // namespace

Status send(const Context& context, const Parcel& parcel) {
  if (parcel.bytes <= 0 && parcel.num_zeros <= 0) return {};
  const int64_t blocks = (parcel.num_zeros + kPlanThreads - 1) / kPlanThreads;
  return launch_blocks<send_kernel, kPlanThreads, 0>(context.stream, blocks > 1 ? blocks : 1, 4, 0, parcel);
}

bool runs_here() {
#if defined(PYLORA_EMULATE)
  return true;
#else
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, plan_kernel) == cudaSuccess) return true;
  static_cast<void>(cudaGetLastError());  // this question's answer is not the next launch's error
  return false;
#endif
}

Status plan_segments(const Context& context, const PlanArgs& args) { return launch_block<plan_kernel>(context, args); }
Status group_rows(const Context& context, const PlanArgs& args) { return launch_block<group_kernel>(context, args); }

}  // namespace pylora::cuda
