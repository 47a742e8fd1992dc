// The op as C++ calls it: through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace pylora::uniform {

inline void call_uniform(at::Tensor out, double bound, int64_t skip) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pylora::uniform_", "")
                             .typed<void(at::Tensor&, double, int64_t)>();
  op.call(out, bound, skip);
}

}  // namespace pylora::uniform
