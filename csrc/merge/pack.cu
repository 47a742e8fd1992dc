// Packing on a GPU: a launch an adapter, and one for each that has row scales.
#include <cmath>

#include "cuda/segments.cuh"
#include "merge/packed.cuh"
#include "merge/rounding.cuh"

namespace pylora::merge {
namespace {

constexpr int kPackThreads = 256;

struct ScaleArgs {
  int64_t features, padded;
  const void* given;  // [features], accumulators
  const void* later;  // [padded]: the product of later adapters' scales; null: none has any
  void* product;      // [padded]
  void* inverse;      // [padded], of the product; 0 where it is not finite
};

template <class C>
__global__ void __launch_bounds__(kPackThreads) scale_kernel(const ScaleArgs args) {
  for (int64_t i = cuda::first_item(); i < args.padded; i += cuda::item_step()) {
    C product = 1;
    if (args.later) product = cuda::load_readonly<C>(static_cast<const C*>(args.later) + i);
    if (i < args.features)
      product = multiply_rn(product, cuda::load_readonly<C>(static_cast<const C*>(args.given) + i));
    C inverse = C(1) / product;
    if (!(inverse - inverse == C(0))) inverse = 0;
    cuda::store_global(static_cast<C*>(args.product) + i, product);
    cuda::store_global(static_cast<C*>(args.inverse) + i, inverse);
  }
}

/// One adapter's factor on one side of the product.
struct PackSide {
  const void* data = nullptr;
  int64_t matrix_stride = 0, feature_stride = 0, rank_stride = 0;
  int64_t features = 0, padded = 0;
  bool is_scaled = false;
  void *out = nullptr, *low = nullptr;  // from the adapter's first rank on
};

struct PackArgs {
  PackSide left, right;
  DType dtype;
  int64_t count, rank, total_rank;
  double scaling;
  const void* scales;  // accumulators; null: ones
};

template <class C, class Packed>
PYLORA_DEVICE void pack_element(const PackArgs& args, const PackSide& side, int64_t index) {
  const int64_t feature = index % side.padded, line = index / side.padded;
  const int64_t k = line % args.rank, matrix = line / args.rank;
  C value = 0;
  if (feature < side.features) {
    value = cuda::load_element<C>(side.data, args.dtype,
                                  matrix * side.matrix_stride + k * side.rank_stride + feature * side.feature_stride);
    if (side.is_scaled) {
      value = multiply_rn(value, static_cast<C>(args.scaling));
      if (args.scales) value = multiply_rn(value, cuda::load_readonly<C>(static_cast<const C*>(args.scales) + feature));
    }
  }
  const int64_t place = (matrix * args.total_rank + k) * side.padded + feature;
  if constexpr (std::is_same_v<Packed, bf16>) {
    const bf16 high = cuda::narrow<bf16>(value);
    cuda::store_global(static_cast<bf16*>(side.out) + place, high);
    if (!side.low) return;
    const float rest = value - cuda::widen(high);  // NaN where the value is not finite: it is in `high` already
    cuda::store_global(static_cast<bf16*>(side.low) + place, cuda::narrow<bf16>(rest == rest ? rest : 0.0f));
  } else {
    cuda::store_global(static_cast<C*>(side.out) + place, value);
  }
}

template <class C, class Packed>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const PackArgs args) {
  const int64_t left = args.count * args.rank * args.left.padded;
  const int64_t all = left + args.count * args.rank * args.right.padded;
  for (int64_t i = cuda::first_item(); i < all; i += cuda::item_step()) {
    if (i < left) {
      pack_element<C, Packed>(args, args.left, i);
    } else {
      pack_element<C, Packed>(args, args.right, i - left);
    }
  }
}

bool is_power_of_two(double value) {
  int exponent = 0;
  const double fraction = std::frexp(value, &exponent);
  return fraction == 0.5 || fraction == -0.5;
}

/// Whether one bf16 holds all that is packed of this side.
bool fits_bf16(const Change& change, bool is_scaled) {
  for (int64_t i = 0; i < change.num_adapters; ++i) {
    const Adapter& each = change.adapters[i];
    if (each.dtype != DType::bf16) return false;
    if (is_scaled && (each.row_scale || !is_power_of_two(each.scaling))) return false;
  }
  return true;
}

char* take(char** next, int64_t bytes) {
  char* const block = *next;
  *next += align_up(bytes);
  return block;
}

/// One side's memory.
PackedSide lay_out(const Weight& w, const Change& change, bool tensor_cores, int64_t padded, bool is_scaled,
                   char** next) {
  const int64_t elements = w.count * total_rank(change) * padded;
  char* const data = take(next, elements * packed_element_bytes(w, tensor_cores));
  const bool has_low = tensor_cores && !fits_bf16(change, is_scaled);
  return {data, has_low ? data + elements * 2 : nullptr, padded};
}

/// The factor of an adapter whose features are W's rows (left) or columns.
PackSide side_of(const Weight& w, const Adapter& adapter, bool left, const PackedSide& packed, int64_t first_rank,
                 int64_t element_bytes) {
  PackSide side;
  side.is_scaled = left != w.transposed;  // B has the output features
  const ConstMatrix& m = side.is_scaled ? adapter.b : adapter.a;
  side.data = m.data;
  side.matrix_stride = side.is_scaled ? adapter.b_stride : adapter.a_stride;
  side.feature_stride = side.is_scaled ? m.row_stride : m.column_stride;
  side.rank_stride = side.is_scaled ? m.column_stride : m.row_stride;
  side.features = left ? w.rows : w.columns;
  side.padded = packed.line;
  const int64_t start = first_rank * packed.line * element_bytes;
  side.out = const_cast<char*>(static_cast<const char*>(packed.data)) + start;
  if (packed.low) side.low = const_cast<char*>(static_cast<const char*>(packed.low)) + start;
  return side;
}

template <class C, class Packed>
Status pack(const Context& context, const Weight& w, const Change& change, char* memory, PackedFactors* packed) {
  constexpr bool kHalves = std::is_same_v<Packed, bf16>;
  packed->rank = total_rank(change);
  packed->left = lay_out(w, change, kHalves, padded_rows(w), !w.transposed, &memory);
  packed->right = lay_out(w, change, kHalves, padded_columns(w), w.transposed, &memory);
  int64_t first_rank = packed->rank;
  const void* later = nullptr;
  Status status;
  ScaleArgs scale{w.out_features(), w.transposed ? padded_columns(w) : padded_rows(w), nullptr, nullptr,
                  nullptr,          memory + change.num_adapters * scale_bytes(w)};
  for (int64_t i = change.num_adapters; i-- > 0;) {  // a scale also multiplies what adapters before its own added
    const Adapter& each = change.adapters[i];
    first_rank -= each.rank;
    if (each.row_scale) {
      scale.given = each.row_scale;
      scale.later = later;
      scale.product = memory + i * scale_bytes(w);
      const int64_t blocks = (scale.padded + kPackThreads - 1) / kPackThreads;
      status = cuda::launch_blocks<scale_kernel<C>, kPackThreads, 0>(context.stream, blocks, 8, 0, scale);
      if (!status.is_ok()) return status;
      later = scale.product;
    }
    const PackArgs args{side_of(w, each, true, packed->left, first_rank, sizeof(Packed)),
                        side_of(w, each, false, packed->right, first_rank, sizeof(Packed)),
                        each.dtype,
                        w.count,
                        each.rank,
                        packed->rank,
                        each.scaling,
                        later};
    const int64_t elements = w.count * each.rank * (packed->left.line + packed->right.line);
    status = cuda::launch_blocks<pack_kernel<C, Packed>, kPackThreads, 0>(
        context.stream, (elements + kPackThreads - 1) / kPackThreads, 8, 0, args);
    if (!status.is_ok()) return status;
  }
  packed->scale = later;
  packed->inverse = later ? scale.inverse : nullptr;
  return {};
}

}  // namespace

Status pack_cuda(const Context& context, const Weight& w, const Change& change, bool tensor_cores, void* memory,
                 PackedFactors* packed) {
  char* const bytes = static_cast<char*>(memory);
  if (tensor_cores) return pack<float, bf16>(context, w, change, bytes, packed);
  if (w.dtype == DType::f64) return pack<double, double>(context, w, change, bytes, packed);
  return pack<float, float>(context, w, change, bytes, packed);
}

}  // namespace pylora::merge
