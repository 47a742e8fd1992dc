// scale and scale_backward: a thread has some neighbouring columns, whose factors it computes once, and walks tokens.
#include "cuda/segments.cuh"
#include "dora/heuristics.h"

namespace pylora::dora {
namespace {

constexpr int kThreads = static_cast<int>(kScaleThreads);

/// Neighbouring elements, moved by one instruction.
template <class T, int N>
struct alignas(N * sizeof(T)) Chunk {
  T element[N];
};

/// Element (row, column).
template <class T, class Pointer>
PYLORA_DEVICE auto* at(const Matrix<Pointer>& m, int64_t row, int64_t column) {
  using Element = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const T, T>;
  return static_cast<Element*>(m.data) + row * m.row_stride + column;
}

/// The norm as it divides: rounded to magnitude's dtype, so that a magnitude that was a norm gives a factor of 1.
template <class C>
PYLORA_DEVICE C divisor_of(double norm, DType magnitude_dtype) {
  C rounded = static_cast<C>(norm);
  if (magnitude_dtype == DType::bf16) rounded = cuda::widen(cuda::narrow<bf16>(static_cast<float>(norm)));
  if (magnitude_dtype == DType::f16) rounded = cuda::widen(cuda::narrow<f16>(static_cast<float>(norm)));
  if (magnitude_dtype == DType::f32) rounded = static_cast<C>(static_cast<float>(norm));
  return rounded == C(0) ? C(1) : rounded;
}

template <class C, class Args>
PYLORA_DEVICE C divisor_at(const Args& args, int64_t column) {
  return divisor_of<C>(cuda::load_readonly<double>(args.norms + column), args.magnitude_dtype);
}

template <class C, class Args>
PYLORA_DEVICE C factor_at(const Args& args, int64_t column) {
  return cuda::load_element<C>(args.magnitude, args.magnitude_dtype, column) / divisor_at<C>(args, column);
}

/// Token blocks by column blocks.
template <int kWide>
struct Grid {
  int64_t column_blocks, pieces;

  PYLORA_HOST_DEVICE constexpr Grid(int64_t num_tokens, int64_t width)
      : column_blocks((width + kThreads * kWide - 1) / (kThreads * kWide)),
        pieces(scale_token_blocks(num_tokens) * column_blocks) {}
};

template <class T, int kWide>
__global__ void __launch_bounds__(kThreads) scale_kernel(const ScaleArgs args) {
  using C = Accumulator<T>;
  using Elements = Chunk<T, kWide>;
  const Grid<kWide> grid(args.num_tokens, args.out_features);
  cuda::for_each_piece(grid.pieces, [&](int64_t piece) {
    const int64_t column = (piece % grid.column_blocks * kThreads + threadIdx.x) * kWide;
    if (column >= args.out_features) return;
    C factor[kWide], bias[kWide] = {};
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      factor[i] = factor_at<C>(args, column + i);
      if (args.bias) bias[i] = cuda::load_element<C>(args.bias, args.dtype, column + i);
    }
    const int64_t first = piece / grid.column_blocks * kScaleTokens;
    for (int64_t t = first; t < first + kScaleTokens && t < args.num_tokens; ++t) {
      const Elements z = cuda::load_global<Elements>(at<T>(args.z, t, column));  // may be y
      Elements rest, y;
      if (args.rest.data) rest = cuda::load_readonly<Elements>(at<T>(args.rest, t, column));
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        C value = factor[i] * cuda::widen(z.element[i]);
        if (args.rest.data) value += cuda::widen(rest.element[i]);
        y.element[i] = cuda::narrow<T>(value + bias[i]);
      }
      cuda::store_global(at<T>(args.y, t, column), y);
    }
  });
}

struct BackwardWork {
  ScaleBackwardArgs args;
  int32_t* counters;
  void* planes;  // accumulators, [token blocks][out_features]
};

/// The block that comes last sums the token blocks in their order.
template <class C>
PYLORA_DEVICE void add_up_tokens(const BackwardWork& work, int64_t column_block, int64_t first, int64_t end, int* box) {
  const ScaleBackwardArgs& args = work.args;
  const int64_t blocks = scale_token_blocks(args.num_tokens);
  __syncthreads();  // the block's sums are written
  if (threadIdx.x == 0) *box = cuda::arrive(work.counters + column_block) == blocks - 1;
  __syncthreads();
  if (*box) {
    for (int64_t c = first + threadIdx.x; c < end; c += kThreads) {
      C sum = 0;
      for (int64_t b = 0; b < blocks; ++b)
        sum += cuda::load_coherent<C>(static_cast<const C*>(work.planes) + b * args.out_features + c);
      cuda::store_global(static_cast<C*>(args.dmagnitude) + c, sum / divisor_at<C>(args, c));
    }
    if (threadIdx.x == 0) cuda::store_global(work.counters + column_block, 0);
  }
  __syncthreads();  // the box has been read
}

template <class T, int kWide>
__global__ void __launch_bounds__(kThreads) scale_backward_kernel(const BackwardWork work) {
  using C = Accumulator<T>;
  using Elements = Chunk<T, kWide>;
  const ScaleBackwardArgs& args = work.args;
  int* const box = cuda::shared_memory<int>();
  const Grid<kWide> grid(args.num_tokens, args.out_features);
  cuda::for_each_piece(grid.pieces, [&](int64_t piece) {
    const int64_t column_block = piece % grid.column_blocks, token_block = piece / grid.column_blocks;
    const int64_t first = column_block * kThreads * kWide, column = first + threadIdx.x * kWide;
    const int64_t tokens = token_block * kScaleTokens;
    if (column < args.out_features) {
      C factor[kWide], sum[kWide] = {};
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        factor[i] = factor_at<C>(args, column + i);
      for (int64_t t = tokens; t < tokens + kScaleTokens && t < args.num_tokens; ++t) {
        const Elements dy = cuda::load_readonly<Elements>(at<T>(args.dy, t, column));
        if (args.dmagnitude) {
          const Elements z = cuda::load_readonly<Elements>(at<T>(args.z, t, column));
#pragma unroll
          for (int i = 0; i < kWide; ++i)
            sum[i] += cuda::widen(dy.element[i]) * cuda::widen(z.element[i]);
        }
        if (!args.dz.data) continue;
        Elements dz;
#pragma unroll
        for (int i = 0; i < kWide; ++i)
          dz.element[i] = cuda::narrow<T>(factor[i] * cuda::widen(dy.element[i]));
        cuda::store_global(at<T>(args.dz, t, column), dz);
      }
      C* const plane = static_cast<C*>(work.planes) + token_block * args.out_features + column;
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        if (args.dmagnitude) cuda::store_global(plane + i, sum[i]);
    }
    const int64_t end = first + kThreads * kWide;
    if (args.dmagnitude)
      add_up_tokens<C>(work, column_block, first, end < args.out_features ? end : args.out_features, box);
  });
}

bool is_aligned(const void* data, int64_t stride, DType dtype) {
  return !data || cuda::rows_are_aligned(data, dtype, stride);
}

template <class T, int kWide>
Status run(const Context& context, const ScaleArgs& args) {
  return cuda::launch_blocks<scale_kernel<T, kWide>, kThreads, 0>(
      context.stream, Grid<kWide>(args.num_tokens, args.out_features).pieces, 8, 0, args);
}

template <class T, int kWide>
Status run(const Context& context, const ScaleBackwardArgs& args) {
  const BackwardWork work{args, static_cast<int32_t*>(args.workspace),
                          static_cast<char*>(args.workspace) + scale_counter_bytes_cuda(args)};
  return cuda::launch_blocks<scale_backward_kernel<T, kWide>, kThreads, 128>(
      context.stream, Grid<kWide>(args.num_tokens, args.out_features).pieces, 8, 128, work);
}

template <class T, class Args>
Status run(const Context& context, const Args& args, bool aligned) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  return aligned && args.out_features % kWide == 0 ? run<T, kWide>(context, args) : run<T, 1>(context, args);
}

template <class Args>
Status dispatch(const Context& context, const Args& args, bool aligned) {
  switch (args.dtype) {
    case DType::bf16:
      return run<bf16>(context, args, aligned);
    case DType::f16:
      return run<f16>(context, args, aligned);
    case DType::f64:
      return run<double>(context, args, aligned);
    default:
      return run<float>(context, args, aligned);
  }
}

}  // namespace

Status scale_cuda(const Context& context, const ScaleArgs& args) {
  if (args.num_tokens == 0) return {};
  return dispatch(context, args,
                  is_aligned(args.z.data, args.z.row_stride, args.dtype) &&
                      is_aligned(args.rest.data, args.rest.row_stride, args.dtype) &&
                      is_aligned(args.y.data, args.y.row_stride, args.dtype));
}

Status scale_backward_cuda(const Context& context, const ScaleBackwardArgs& args) {
  return dispatch(context, args,
                  is_aligned(args.dy.data, args.dy.row_stride, args.dtype) &&
                      is_aligned(args.z.data, args.z.row_stride, args.dtype) &&
                      is_aligned(args.dz.data, args.dz.row_stride, args.dtype));
}

}  // namespace pylora::dora
