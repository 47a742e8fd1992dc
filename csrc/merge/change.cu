// The merge launchers on a GPU: pack the factors, then one pass over W.
#include "merge/block.cuh"

namespace pylora::merge {
namespace {

template <class Sums>
__global__ void __launch_bounds__(kThreads, Sums::kResident) change_kernel(const Work work) {
  if (work.mode == Mode::put_back && cuda::load_uniform<int32_t>(&work.answers->changed) == 0) return;
  TileChange<Sums> tile(work);
  cuda::for_each_piece(TileChange<Sums>::num_pieces(work.weight), [&](int64_t piece) { tile.change(piece); });
}

template <class Sums>
Status launch(const Context& context, const Work& work) {
  using Tile = TileChange<Sums>;
  return cuda::launch_blocks<change_kernel<Sums>, kThreads, Tile::kSharedBytes>(
      context.stream, Tile::num_pieces(work.weight), Sums::kResident, Tile::kSharedBytes, work);
}

Status launch(const Context& context, const Work& work, bool tensor_cores) {
  switch (work.weight.dtype) {
    case DType::bf16:
      return tensor_cores ? launch<TensorSums<bf16>>(context, work) : launch<FmaSums<bf16>>(context, work);
    case DType::f16:
      return tensor_cores ? launch<TensorSums<f16>>(context, work) : launch<FmaSums<f16>>(context, work);
    case DType::f64:
      return launch<FmaSums<double>>(context, work);
    default:
      return launch<FmaSums<float>>(context, work);
  }
}

bool has_ranks(const Change& change) {
  for (int64_t i = 0; i < change.num_adapters; ++i)
    if (change.adapters[i].rank < 1) return false;
  return true;
}

Status check(const DeviceArgs& args) {
  const Weight& w = args.weight;
  if (w.count < 0 || w.rows < 0 || w.columns < 0) return invalid_argument("merge: negative size");
  if (w.rows > 1 && w.row_stride < w.columns) return invalid_argument("merge: w: overlapping rows");
  if (!has_ranks(args.take_out) || !has_ranks(args.put_in)) {
    return invalid_argument("merge: rank: expected at least 1");
  }
  if (args.tensor_cores && !merges_by_tensor_cores(w.dtype)) {
    return invalid_argument("merge: tensor_cores: expected 16-bit w");
  }
  if (args.check && (!args.read || args.put_in.num_adapters)) {
    return invalid_argument("merge: check: expected a log that is taken out, and nothing to put in");
  }
  return {};
}

bool is_empty(const Weight& w) { return w.count == 0 || w.rows == 0 || w.columns == 0; }

Work work_of(const DeviceArgs& args) {
  Work work;
  work.weight = args.weight;
  work.aligned = cuda::rows_are_aligned(args.weight.data, args.weight.dtype, args.weight.row_stride,
                                        args.weight.count > 1 ? args.weight.matrix_stride : 0);
  if (args.read) work.read = *args.read;
  if (args.write) work.write = *args.write;
  work.answers = args.answers;
  return work;
}

/// Queues the packing of what there is.
Status pack(const Context& context, const DeviceArgs& args, Work* work) {
  char* memory = static_cast<char*>(args.workspace);
  if (args.take_out.num_adapters) {
    const Status status = pack_cuda(context, args.weight, args.take_out, args.tensor_cores, memory, &work->out);
    if (!status.is_ok()) return status;
    work->takes_out = true;
  }
  memory += packed_bytes_cuda(args.weight, args.take_out, args.tensor_cores);
  if (args.put_in.num_adapters) {
    const Status status = pack_cuda(context, args.weight, args.put_in, args.tensor_cores, memory, &work->in);
    if (!status.is_ok()) return status;
    work->puts_in = true;
  }
  memory += packed_bytes_cuda(args.weight, args.put_in, args.tensor_cores);
  work->done = reinterpret_cast<int32_t*>(memory);
  return {};
}

/// Takes out with a check on the way: tiles that were done are put in again, which gives the bits they had, if one turns
/// out to be changed.
Status change_checked(const Context& context, Work work, bool tensor_cores) {
  work.check = true;
  Status status = launch(context, work, tensor_cores);
  if (!status.is_ok()) return status;
  work.mode = Mode::put_back;
  work.in = work.out;
  work.takes_out = false;
  work.puts_in = true;
  work.check = false;
  work.read = {};
  return launch(context, work, tensor_cores);
}

}  // namespace

Status change_cuda(const Context& context, const DeviceArgs& args) {
  if (const Status status = check(args); !status.is_ok()) return status;
  if (!args.take_out.num_adapters && !args.put_in.num_adapters) {
    return invalid_argument("merge: adapters: expected at least one");
  }
  if (is_empty(args.weight)) return {};
  Work work = work_of(args);
  if (const Status status = pack(context, args, &work); !status.is_ok()) return status;
  if (args.check) return change_checked(context, work, args.tensor_cores);
  work.done = nullptr;
  return launch(context, work, args.tensor_cores);
}

Status check_unchanged_cuda(const Context& context, const DeviceArgs& args) {
  if (!args.read) return invalid_argument("merge: read: expected a log");
  if (const Status status = check(args); !status.is_ok()) return status;
  if (is_empty(args.weight)) return {};
  Work work = work_of(args);
  work.mode = Mode::check_unchanged;
  work.check = true;
  return launch(context, work, false);
}

Status is_finite_cuda(const Context& context, const DeviceArgs& args) {
  if (const Status status = check(args); !status.is_ok()) return status;
  if (is_empty(args.weight)) return {};
  Work work = work_of(args);
  if (const Status status = pack(context, args, &work); !status.is_ok()) return status;
  work.done = nullptr;
  work.mode = Mode::is_finite;
  work.takes_out = false;
  work.read = {};
  work.write = {};
  return launch(context, work, args.tensor_cores);
}

int tensor_core_architecture() {
#if defined(PYLORA_EMULATE)
  return 80;
#else
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return 0;
  return 10 * major + minor;
#endif
}

}  // namespace pylora::merge
