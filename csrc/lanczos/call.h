// The Lanczos ops as C++ calls them: through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace pylora::lanczos {

inline void call_bidiagonalise(const at::Tensor& matrix, at::Tensor basis, at::Tensor left, at::Tensor diagonal,
                               at::Tensor above, int64_t locked, int64_t begin, int64_t end, int64_t seed) {
  using Signature =
      void(const at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, int64_t, int64_t, int64_t, int64_t);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("pylora::bidiagonalise_", "").typed<Signature>();
  op.call(matrix, basis, left, diagonal, above, locked, begin, end, seed);
}

inline at::Tensor call_gram_product(const at::Tensor& matrix, const at::Tensor& x) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pylora::gram_product", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  return op.call(matrix, x);
}

inline std::tuple<at::Tensor, at::Tensor> call_ritz_residuals(const at::Tensor& diagonal, const at::Tensor& above,
                                                              int64_t rank) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, int64_t);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("pylora::ritz_residuals", "").typed<Signature>();
  return op.call(diagonal, above, rank);
}

}  // namespace pylora::lanczos
