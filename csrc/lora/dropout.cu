// dropout_cuda: one Philox counter a thread, hence eight elements, eight columns apart (common/philox.h). Eight
// neighbouring threads cover 64 neighbouring columns, so that every load and store of a warp touches whole sectors.
#include "cuda/grid.cuh"
#include "lora/lora.h"

namespace pylora::lora {
namespace {

constexpr int kThreads = 256, kLanes = 8, kElements = 8;

template <class T>
__global__ void __launch_bounds__(kThreads) dropout_kernel(DropoutArgs args) {
  using C = Accumulator<T>;
  const int64_t blocks = (args.width + kDropoutBlock - 1) / kDropoutBlock;
  const auto seed = cuda::load_uniform<uint64_t>(args.dropout.rng);
  const auto offset = cuda::load_uniform<uint64_t>(args.dropout.rng + 1);
  for (int64_t item = cuda::first_item(); item < args.num_tokens * blocks * kLanes; item += cuda::item_step()) {
    const int64_t row = item / (blocks * kLanes), counter = item % (blocks * kLanes);
    const PhiloxWords random = philox4x32({{static_cast<uint32_t>(counter), static_cast<uint32_t>(row),
                                            static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)}},
                                          seed);
    const T* x = static_cast<const T*>(args.x.data) + row * args.x.row_stride;
    T* out = static_cast<T*>(args.out.data) + row * args.out.row_stride;
#pragma unroll
    for (int v = 0; v < kElements; ++v) {
      const int64_t column = counter / kLanes * kDropoutBlock + v * kLanes + counter % kLanes;
      const uint32_t bits = random.word[v / 2] >> (v % 2 * 16) & 0xffff;
      if (column >= args.width) continue;
      // A product, as on the CPU and in torch, so that a dropped infinity is a NaN and does not vanish.
      const C multiplier = bits < args.dropout.threshold ? C(0) : static_cast<C>(args.dropout.keep_scale);
      cuda::store_global(out + column, cuda::narrow<T>(cuda::widen(cuda::load_global<T>(x + column)) * multiplier));
    }
  }
}

template <class T>
Status launch(const Context& context, const DropoutArgs& args) {
  const int64_t items = args.num_tokens * ((args.width + kDropoutBlock - 1) / kDropoutBlock) * kLanes;
  return cuda::launch_blocks<dropout_kernel<T>, kThreads, 0>(context.stream, (items + kThreads - 1) / kThreads, 16, 0,
                                                             args);
}

}  // namespace

Status dropout_cuda(const Context& context, const DropoutArgs& args) {
  if (args.num_tokens == 0 || args.width == 0) return {};
  switch (args.dtype) {
    case DType::f32:
      return launch<float>(context, args);
    case DType::bf16:
      return launch<bf16>(context, args);
    case DType::f16:
      return launch<f16>(context, args);
    case DType::f64:
      return launch<double>(context, args);
  }
  return invalid_argument("dropout: dtype: expected f32, bf16, f16 or f64");
}

}  // namespace pylora::lora
