// What the op files do with tensors whatever the op: leading dimensions, accumulators, operators found by name.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <vector>

#include "binding/dtype.h"

namespace pylora::binding {

/// Inside the ops, dtypes are settled: autocast would change those of single products under the op's feet.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

/// Leading dimensions flattened; counted, since -1 is ambiguous for a width of 0.
inline at::Tensor flat_rows(const at::Tensor& t) {
  if (t.dim() == 2) return t;
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    count *= t.size(i);
  return t.reshape({count, t.size(-1)});
}

/// t's leading dimensions with another last one.
inline std::vector<int64_t> shape_with_width(const at::Tensor& t, int64_t width) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = width;
  return shape;
}

/// Rows as a result of t's leading dimensions.
inline at::Tensor unflattened(const at::Tensor& rows, const at::Tensor& t) {
  return t.dim() == 2 ? rows : rows.view(shape_with_width(t, rows.size(1)));
}

inline at::Tensor as_accumulators(const at::Tensor& t) { return t.to(accumulator_type(t.scalar_type())); }

/// An operator by its schema's name; to be kept in a static.
template <class Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

}  // namespace pylora::binding
