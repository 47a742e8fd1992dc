// The kernels of segments.h for tokens whose x is one-hot, as an embedding's: a product with A is a column of it.
#include "cpu/segments_kernels.h"
#include "cpu/simd/stage.h"

namespace pylora::PYLORA_ISA {
namespace {

template <class F, class C>
void copy_column(ConstMatrix factor, int64_t column, int64_t rank, C* v) {
  const F* p = static_cast<const F*>(factor.data) + column * factor.column_stride;
  for (int64_t r = 0; r < rank; ++r)
    v[r] = static_cast<C>(widened(p + r * factor.row_stride));
}

template <class C>
using CopyColumn = void (*)(ConstMatrix, int64_t, int64_t, C*);
/// Indexed by the factor's DType.
template <class C>
constexpr CopyColumn<C> kCopyColumn[kNumDTypes] = {copy_column<float, C>, copy_column<bf16, C>, copy_column<f16, C>,
                                                   copy_column<double, C>};

template <class C>
void look_up(int64_t begin, int64_t end, const SegmentPlan& plan, const int64_t* columns, ConstMatrix factor,
             DType factor_dtype, int64_t rank, void* v, int64_t v_stride) {
  const CopyColumn<C> copy = kCopyColumn<C>[static_cast<int>(factor_dtype)];
  for (int64_t p = begin; p < end; ++p) {
    const int64_t token = plan.token(p);
    copy(factor, columns[token], rank, static_cast<C*>(v) + token * v_stride);
  }
}

template <class C>
void add_up(int64_t begin, int64_t end, int64_t first, int64_t last, const SegmentPlan& plan, const void* g,
            int64_t g_stride, const int64_t* columns, int64_t frozen_column, int64_t width, void* sums) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t token = plan.token(p), column = columns[token];
    if (column == frozen_column) continue;
    const C* from = static_cast<const C*>(g) + token * g_stride;
    for (int64_t r = begin; r < end; ++r)
      static_cast<C*>(sums)[r * width + column] += from[r];
  }
}

}  // namespace

extern const SegmentLookupKernels segment_lookup_kernels;
const SegmentLookupKernels segment_lookup_kernels = {
    {look_up<float>, look_up<float>, look_up<float>, look_up<double>},
    {add_up<float>, add_up<float>, add_up<float>, add_up<double>},
};

}  // namespace pylora::PYLORA_ISA
