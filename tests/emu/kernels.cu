// Kernels that show what the emulator computes: fragments, shuffles, atomics, counts. With nvcc they are CUDA kernels.
#include "emu_kernels.h"

namespace pylora::emu_tests {
namespace {

using namespace cuda;

/// Registers in and out of one mma: [32 lanes][4 of a, 2 of b] and [32][4] of d.
template <class Mma>
__global__ void mma_kernel(MmaArgs args) {
  const int lane = lane_id();
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i)
    a[i] = load_readonly<uint32_t>(args.a + lane * 4 + i);
  for (int i = 0; i < 2; ++i)
    b[i] = load_readonly<uint32_t>(args.b + lane * 2 + i);
  for (int i = 0; i < 4; ++i)
    d[i] = load_global<float>(args.d + lane * 4 + i);
  Mma::multiply(d, a, b);
  for (int i = 0; i < 4; ++i)
    store_global(args.d + lane * 4 + i, d[i]);
}

template <class T>
struct Mma16 {
  static __device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<T>(d, a, b);
  }
};
struct MmaTf32 {
  static __device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k8_tf32(d, a, b);
  }
};

/// Stages num_rows rows of eight elements in shared memory and writes each lane's registers.
template <int N, bool Transposed>
__global__ void ldmatrix_kernel(MatrixArgs args) {
  auto* const tile = shared_memory<uint4>();
  const int lane = lane_id();
  if (lane < 8 * N) tile[lane] = load_readonly<uint4>(args.rows + lane * 8);
  __syncwarp();
  uint32_t r[N];
  load_matrices<N, Transposed>(r, tile + lane % (8 * N));
  for (int i = 0; i < N; ++i)
    store_global(args.registers + lane * N + i, r[i]);
}

/// out[lane] of six collectives in a row, over lanes of `mask`.
__global__ void collectives_kernel(CollectiveArgs args) {
  const int lane = lane_id();
  if ((args.mask >> lane & 1) == 0) return;
  const int value = 100 + lane;
  const int results[kCollectives] = {
      __shfl_sync(args.mask, value, lane + args.operand, args.width),
      __shfl_up_sync(args.mask, value, args.operand, args.width),
      __shfl_down_sync(args.mask, value, args.operand, args.width),
      __shfl_xor_sync(args.mask, value, args.operand, args.width),
      static_cast<int>(__ballot_sync(args.mask, lane % 3 == 0)),
      __any_sync(args.mask, lane == 5) + 2 * __all_sync(args.mask, lane != 5),
  };
  for (int i = 0; i < kCollectives; ++i)
    store_global(args.out + i * kWarpSize + lane, results[i]);
}

__global__ void atomics_kernel(AtomicArgs args) {
  const int id = static_cast<int>(first_item());
  atomic_add(args.f32, 0.5f * id);
  atomic_add(args.i32, id);
  atomic_add_pair(args.pairs_bf16, pack<bf16>(1, 2));
  atomic_add_pair(args.pairs_f16, pack<f16>(1, 2));
  while (atomic_cas(args.cas, id, id + 1) != id)
    spin_wait();
}

/// out[linear thread] = the number that (block, thread) has in x-fastest order.
__global__ void index_kernel(IndexArgs args) {
  const int64_t block = blockIdx.x + static_cast<int64_t>(gridDim.x) * (blockIdx.y + gridDim.y * blockIdx.z);
  const int64_t thread = threadIdx.x + static_cast<int64_t>(blockDim.x) * (threadIdx.y + blockDim.y * threadIdx.z);
  const int64_t threads = static_cast<int64_t>(blockDim.x) * blockDim.y * blockDim.z;
  store_global(args.out + block * threads + thread, static_cast<int>(block * threads + thread));
}

/// One load and store a lane, `stride` bytes apart, of `V`; a uniform load; a partial cp.async.
template <class V>
__global__ void count_kernel(CountArgs args) {
  const int lane = lane_id();
  const auto value = load_readonly<V>(args.x + lane * args.stride);
  store_global(args.y + lane * args.stride, value);
  for (int i = 0; i < args.uniform_loads; ++i)
    static_cast<void>(load_uniform<int>(args.x + 4 * i));
  if (args.copied_bytes != 0) {
    cp_async<16>(shared_memory<uint4>() + lane, args.x + lane * 16, args.copied_bytes);
    cp_async_commit();
    cp_async_wait<0>();
  }
}

/// Warp 0 fills a slot, warp 1 takes it, eight times: named barriers both ways.
__global__ void pipe_kernel(PipeArgs args) {
  constexpr int kFull = 1, kEmpty = 2, kTurns = 8, kThreads = 2 * kWarpSize;
  auto* const slot = shared_memory<float>();
  const int lane = lane_id();
  for (int turn = 0; turn < kTurns; ++turn) {
    const int at = turn * kWarpSize + lane;
    if (warp_id() == 0) {
      if (turn != 0) barrier_sync(kEmpty, kThreads);
      slot[lane] = load_readonly<float>(args.x + at);
      barrier_arrive(kFull, kThreads);
    } else {
      barrier_sync(kFull, kThreads);
      store_global(args.y + at, slot[kWarpSize - 1 - lane]);
      if (turn != kTurns - 1) barrier_arrive(kEmpty, kThreads);
    }
  }
}

/// y = T(f32(x)) and pairs of it through pack and unpack: the conversions.
template <class T>
__global__ void convert_kernel(ConvertArgs args) {
  for (int64_t i = first_item(); i < args.count; i += item_step()) {
    const T narrowed = narrow<T>(load_readonly<float>(args.x + i));
    store_global(static_cast<T*>(args.narrowed) + i, narrowed);
    store_global(args.widened + i, widen(narrowed));
    const float2 pair = unpack<T>(pack<T>(load_readonly<float>(args.x + i), widen(narrowed)));
    store_global(args.paired + i, pair.x - pair.y);
  }
}

template <int N>
Status launch_ldmatrix(const Context& context, const MatrixArgs& args) {
  constexpr size_t kBytes = N * 8 * 16;
  if (args.transposed) return launch<ldmatrix_kernel<N, true>>(1, kWarpSize, kBytes, context.stream, args);
  return launch<ldmatrix_kernel<N, false>>(1, kWarpSize, kBytes, context.stream, args);
}

}  // namespace

Status mma(const Context& context, const MmaArgs& args) {
  switch (args.kind) {
    case 0:
      return launch<mma_kernel<Mma16<bf16>>>(1, kWarpSize, 0, context.stream, args);
    case 1:
      return launch<mma_kernel<Mma16<f16>>>(1, kWarpSize, 0, context.stream, args);
    default:
      return launch<mma_kernel<MmaTf32>>(1, kWarpSize, 0, context.stream, args);
  }
}

Status ldmatrix(const Context& context, const MatrixArgs& args) {
  switch (args.count) {
    case 1:
      return launch_ldmatrix<1>(context, args);
    case 2:
      return launch_ldmatrix<2>(context, args);
    default:
      return launch_ldmatrix<4>(context, args);
  }
}

Status collectives(const Context& context, const CollectiveArgs& args) {
  return launch<collectives_kernel>(1, kWarpSize, 0, context.stream, args);
}

Status atomics(const Context& context, const AtomicArgs& args) {
  return launch<atomics_kernel>(args.blocks, args.threads, 0, context.stream, args);
}

Status index(const Context& context, const IndexArgs& args) {
  return launch<index_kernel>(dim3(2, 3, 4), dim3(5, 2, 3), 0, context.stream, args);
}

Status count(const Context& context, const CountArgs& args) {
  constexpr size_t kBytes = kWarpSize * 16;
  switch (args.bytes) {
    case 2:
      return launch<count_kernel<bf16>>(1, kWarpSize, kBytes, context.stream, args);
    case 4:
      return launch<count_kernel<float>>(1, kWarpSize, kBytes, context.stream, args);
    default:
      return launch<count_kernel<uint4>>(1, kWarpSize, kBytes, context.stream, args);
  }
}

Status pipe(const Context& context, const PipeArgs& args) {
  return launch<pipe_kernel>(1, 2 * kWarpSize, kWarpSize * sizeof(float), context.stream, args);
}

Status convert(const Context& context, const ConvertArgs& args) {
  constexpr unsigned kBlocks = 4, kThreads = 64;
  if (args.dtype == DType::bf16) return launch<convert_kernel<bf16>>(kBlocks, kThreads, 0, context.stream, args);
  return launch<convert_kernel<f16>>(kBlocks, kThreads, 0, context.stream, args);
}

}  // namespace pylora::emu_tests
