// Kernels with seeded faults: `bug` 0 is right, any other is what a developer might have got wrong. The comment
// "fault: <name>" marks the line that a report has to name.
#include "emu_kernels.h"

namespace pylora::emu_tests {
namespace {

using namespace cuda;

constexpr int kTile = 64, kTiles = 4;

/// y = x with each tile of 64 reversed, through two stages of shared memory.
/// 1: no wait; 2: a wait that leaves a group too many; 3: no barrier after a copy; 4: none before the next overwrites it.
__global__ void stage_kernel(BugArgs args) {
  auto* const stages = shared_memory<float>();
  const int tid = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int tile) {
    if (tile < kTiles) cp_async<4>(stages + tile % 2 * kTile + tid, args.x + tile * kTile + tid);
    cp_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < kTiles; ++tile) {
    fetch(tile + 1);
    if (args.bug == 2) {
      cp_async_wait<2>();
    } else if (args.bug != 1) {
      cp_async_wait<1>();
    }
    if (args.bug != 3) __syncthreads();
    store_global(args.y + tile * kTile + tid, stages[tile % 2 * kTile + kTile - 1 - tid]);
    if (args.bug != 4) __syncthreads();
  }
  if (args.bug != 1) cp_async_wait<0>();
}

/// y = x with neighbours exchanged, within warps. 1: no __syncwarp.
__global__ void warp_exchange_kernel(BugArgs args) {
  auto* const slots = shared_memory<float>();
  const int tid = static_cast<int>(threadIdx.x);
  slots[tid] = load_readonly<float>(args.x + tid);
  if (args.bug != 1) __syncwarp();
  store_global(args.y + tid, slots[tid ^ 1]);
}

/// 1: two halves of the block at two barriers; 2: half of it has left; 3: a named barrier that too few reach.
__global__ void barriers_kernel(BugArgs args) {
  const bool first = threadIdx.x < kTile / 2;
  if (args.bug == 1) {
    if (first) {
      __syncthreads();  // fault: one half
    } else {
      __syncthreads();  // fault: other half
    }
  }
  if (args.bug == 2 && !first) return;
  if (args.bug == 3 && first) barrier_sync(1, kTile);  // fault: too few
  __syncthreads();                                     // fault: others gone
}

/// 1: half of the lanes shuffle with all; 2: a lane that its own mask lacks; 3: overlapping masks.
__global__ void lanes_kernel(BugArgs args) {
  const int lane = lane_id();
  float value = static_cast<float>(lane);
  if (args.bug == 1) {
    if (lane < 16) value = __shfl_xor_sync(kAllLanes, value, 1);  // fault: absent lanes
  } else if (args.bug == 2) {
    value = __shfl_xor_sync(0xffffu, value, 1);  // fault: not in mask
  } else if (args.bug == 3) {
    value = __shfl_xor_sync(lane < 16 ? 0x1ffffu : 0xffff0000u, value, 1);  // fault: overlap
  } else {
    value = __shfl_xor_sync(kAllLanes, value, 1);
  }
  store_global(args.y + lane, value);
}

/// 1: stores `offset` elements on; 2: loads there; 3: loads four floats at an address that is no multiple of 16;
/// 4: stores to x; 5: follows a null pointer.
__global__ void bounds_kernel(BugArgs args) {
  const int tid = static_cast<int>(threadIdx.x);
  float* const y = args.y + (args.bug == 1 ? args.offset : 0) + tid;
  const float* const x = args.x + (args.bug == 2 ? args.offset : 0) + tid;
  float value = load_global<float>(x);                                       // fault: load
  if (args.bug == 3 && tid == 1) value = load_global<float4>(args.x + 1).x;  // fault: misaligned
  if (args.bug == 4) store_global(const_cast<float*>(x), value);             // fault: constant
  if (args.bug == 5) value = *static_cast<volatile float*>(nullptr);
  store_global(y, value);  // fault: store
}

/// Reverses x in shared memory. 1: reads an element that nobody wrote; 2: writes `offset` bytes past the end; 3: the
/// launch asks for too little.
__global__ void shared_kernel(BugArgs args) {
  auto* const slots = shared_memory<float>();
  const int tid = static_cast<int>(threadIdx.x);
  if (args.bug != 1 || tid != 5) slots[tid] = load_readonly<float>(args.x + tid);
  auto* const end = shared_memory<volatile unsigned char>(kTile * sizeof(float));
  if (args.bug == 2 && tid == 0) end[args.offset] = 1;  // fault: overrun
  __syncthreads();
  store_global(args.y + tid, slots[kTile - 1 - tid]);
}

/// Each block writes a row of partial sums; the last to arrive adds them up, in order: y[blocks, 64] and, after it,
/// y[64]. 1: arrives before its other warps have written; 2: a relaxed count in place of a release; 3: the last block
/// reads with load_global; 4: with load_readonly; 5: everyone adds, last or not; 6: waits for a block too many.
__global__ void last_block_kernel(BugArgs args) {
  const int tid = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
  auto* const is_last = shared_memory<int>();
  const auto count = [&] {
    if (tid == 0) *is_last = (args.bug == 2 ? atomic_add(args.counter, 1) : arrive(args.counter)) == blocks - 1;
  };
  if (args.bug == 1) count();
  store_global(args.y + blockIdx.x * kTile + tid,
               static_cast<float>(blockIdx.x + 1) * load_readonly<float>(args.x + tid));
  __syncthreads();
  if (args.bug != 1) count();
  __syncthreads();
  if (args.bug == 6 && tid == 0) {
    while (load_acquire(args.counter) <= blocks)
      spin_wait();  // fault: livelock
  }
  if (*is_last == 0 && args.bug != 5) return;
  float sum = 0;
  for (int block = 0; block < blocks; ++block) {
    const float* const part = args.y + block * kTile + tid;
    sum += args.bug == 3   ? load_global<float>(part)     // fault: own load
           : args.bug == 4 ? load_readonly<float>(part)   // fault: read-only load
                           : load_coherent<float>(part);  // fault: coherent load
  }
  store_global(args.y + blocks * kTile + tid, sum);
}

/// y[16, 8] = x[16, 16] x[16, 16]^T's first eight columns, in bf16. 1: a's second and third register exchanged;
/// 2: b from the untransposed tile; 3: d's rows exchanged on the way out.
__global__ void fragments_kernel(BugArgs args) {
  auto* const tile = shared_memory<bf16>();
  const int lane = lane_id(), group = lane / 4, member = lane % 4;
  for (int i = lane; i < 256; i += kWarpSize)
    tile[i] = narrow<bf16>(load_readonly<float>(args.x + i));
  __syncwarp();
  uint32_t a[4], b[2];
  cuda::ldmatrix(a, tile + lane % 16 * 16 + lane / 16 * 8);
  if (args.bug == 2) {
    ldmatrix_transposed(b, tile + lane % 8 * 16 + lane / 8 % 2 * 8);
  } else {
    cuda::ldmatrix(b, tile + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  if (args.bug == 1) {
    const uint32_t second = a[1];
    a[1] = a[2];
    a[2] = second;
  }
  float d[4] = {};
  mma_m16n8k16<bf16>(d, a, b);
  for (int i = 0; i < 4; ++i) {
    const int upper = args.bug == 3 ? i / 2 ^ 1 : i / 2;
    store_global(args.y + (group + upper * 8) * 8 + member * 2 + i % 2, d[i]);
  }
}

}  // namespace

Status stage(const Context& context, const BugArgs& args) {
  return launch<stage_kernel>(1, kTile, 2 * kTile * sizeof(float), context.stream, args);
}

Status warp_exchange(const Context& context, const BugArgs& args) {
  return launch<warp_exchange_kernel>(1, kTile, kTile * sizeof(float), context.stream, args);
}

Status barriers(const Context& context, const BugArgs& args) {
  return launch<barriers_kernel>(1, kTile, 0, context.stream, args);
}

Status lanes(const Context& context, const BugArgs& args) {
  return launch<lanes_kernel>(1, kWarpSize, 0, context.stream, args);
}

Status bounds(const Context& context, const BugArgs& args) {
  return launch<bounds_kernel>(1, kTile, 0, context.stream, args);
}

Status shared(const Context& context, const BugArgs& args) {
  const size_t bytes = kTile * sizeof(float) - (args.bug == 3 ? sizeof(float) : 0);
  return launch<shared_kernel>(1, kTile, bytes, context.stream, args);
}

Status last_block(const Context& context, const BugArgs& args) {
  return launch<last_block_kernel>(args.blocks, kTile, sizeof(int), context.stream, args);
}

Status fragments(const Context& context, const BugArgs& args) {
  return launch<fragments_kernel>(1, kWarpSize, 256 * sizeof(bf16), context.stream, args);
}

}  // namespace pylora::emu_tests
