// Argument checks of the op files. Messages read `op: argument: expected X, got Y`.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <vector>

#include "binding/dtype.h"

namespace pylora::binding {

/// Checks of one op's arguments: remembers the op's name, for the messages.
class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  void dim_at_least(const char* name, const at::Tensor& t, int64_t dims) const {
    TORCH_CHECK_VALUE(t.dim() >= dims, op_, ": ", name, ": expected at least ", dims, " dimension(s), got shape ",
                      t.sizes());
  }

  /// -1 in `expected` matches any size.
  void shape(const char* name, const at::Tensor& t, at::IntArrayRef expected) const {
    bool fits = t.dim() == static_cast<int64_t>(expected.size());
    for (size_t i = 0; fits && i < expected.size(); ++i)
      fits = expected[i] < 0 || t.size(static_cast<int64_t>(i)) == expected[i];
    TORCH_CHECK_VALUE(fits, op_, ": ", name, ": expected shape ", expected, " (-1: any), got ", t.sizes());
  }

  void kernel_dtype(const char* name, const at::Tensor& t) const {
    TORCH_CHECK_TYPE(is_kernel_dtype(t.scalar_type()), op_, ": ", name,
                     ": expected float32, bfloat16, float16 or float64, got ", t.scalar_type());
  }

  void same_dtype(const char* name, const at::Tensor& t, const char* like_name, const at::Tensor& like) const {
    TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op_, ": ", name, ": expected the dtype of ", like_name,
                     ", ", like.scalar_type(), ", got ", t.scalar_type());
  }

  void same_device(const char* name, const at::Tensor& t, const char* like_name, const at::Tensor& like) const {
    TORCH_CHECK_VALUE(t.device() == like.device(), op_, ": ", name, ": expected the device of ", like_name, ", ",
                      like.device(), ", got ", t.device());
  }

  void dropout(double p, const std::optional<at::Tensor>& rng, const at::Tensor& x) const {
    TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, op_, ": dropout_p: expected a probability in [0, 1], got ", p);
    if (p == 0.0) return;
    TORCH_CHECK_VALUE(rng.has_value(), op_,
                      ": rng: expected an int64 tensor [seed, offset] with dropout_p > 0, got None");
    TORCH_CHECK_TYPE(rng->scalar_type() == at::kLong, op_, ": rng: expected int64, got ", rng->scalar_type());
    shape("rng", *rng, {2});
    TORCH_CHECK_VALUE(rng->is_contiguous(), op_, ": rng: expected a contiguous tensor");
    same_device("rng", *rng, "x", x);
  }

 private:
  const char* op_;
};

}  // namespace pylora::binding
