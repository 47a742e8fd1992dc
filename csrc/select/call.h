// The selection op as C++ calls it: through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace pylora::select {

inline at::Tensor call_keep_largest(const at::Tensor& x, int64_t count) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pylora::keep_largest", "")
                             .typed<at::Tensor(const at::Tensor&, int64_t)>();
  return op.call(x, count);
}

}  // namespace pylora::select
