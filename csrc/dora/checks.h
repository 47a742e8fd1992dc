// Argument checks of the dora ops, forward and backward: both are public through torch.ops.
#pragma once

#include "binding/checks.h"
#include "dora/call.h"

namespace pylora::dora {

class DoraChecks {
 public:
  explicit DoraChecks(const char* op) : op_(op), check_(op) {}

  void matrix(const char* name, const Tensor& t) const {
    TORCH_CHECK_VALUE(t.dim() == 2, op_, ": ", name, ": expected 2 dimensions, got shape ", t.sizes());
    check_.kernel_dtype(name, t);
  }

  void factors(const char* like_name, const Tensor& like, int64_t in_features, int64_t out_features, const Tensor& a,
               const Tensor& b) const {
    check_.kernel_dtype("a", a);
    check_.shape("a", a, {-1, in_features});
    check_.shape("b", b, {out_features, a.size(0)});
    TORCH_CHECK_VALUE(a.size(0) >= 1, op_, ": a: expected a rank of at least 1, got shape ", a.sizes());
    check_.same_dtype("b", b, "a", a);
    check_.same_device("a", a, like_name, like);
    check_.same_device("b", b, like_name, like);
  }

  void norms(const Tensor& weight, const Tensor& a, const Tensor& b) const {
    matrix("weight", weight);
    factors("weight", weight, weight.size(1), weight.size(0), a, b);
  }

  void like(const char* name, const Tensor& t, const char* like_name, const Tensor& like, at::IntArrayRef shape) const {
    check_.shape(name, t, shape);
    check_.same_dtype(name, t, like_name, like);
    check_.same_device(name, t, like_name, like);
  }

  /// f64 values of the rows of W: norms or squares.
  void per_row(const char* name, const Tensor& t, const char* like_name, const Tensor& like,
               int64_t out_features) const {
    check_.shape(name, t, {out_features});
    TORCH_CHECK_TYPE(t.scalar_type() == at::kDouble, op_, ": ", name, ": expected float64, got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.is_contiguous(), op_, ": ", name, ": expected a contiguous tensor");
    check_.same_device(name, t, like_name, like);
  }

  void magnitude(const Tensor& magnitude, const char* like_name, const Tensor& like, int64_t out_features) const {
    check_.kernel_dtype("magnitude", magnitude);
    check_.shape("magnitude", magnitude, {out_features});
    check_.same_device("magnitude", magnitude, like_name, like);
  }

  void linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a, const Tensor& b,
              const Tensor& magnitudes, const OptionalTensor& norms, const OptionalTensor& squares, double dropout_p,
              const OptionalTensor& rng) const {
    check_.dim_at_least("x", x, 1);
    check_.kernel_dtype("x", x);
    like("weight", weight, "x", x, {-1, x.size(-1)});
    const int64_t out_features = weight.size(0);
    if (bias) like("bias", *bias, "x", x, {out_features});
    factors("x", x, x.size(-1), out_features, a, b);
    magnitude(magnitudes, "x", x, out_features);
    if (norms) per_row("norms", *norms, "x", x, out_features);
    if (squares) per_row("squares", *squares, "x", x, out_features);
    check_.dropout(dropout_p, rng, x);
  }

  void linear_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& a,
                       const Tensor& b, const Tensor& magnitudes, const Tensor& norms, const OptionalTensor& z,
                       const OptionalTensor& v, double dropout_p, const OptionalTensor& rng,
                       BackwardNeeds needs) const {
    check_.dim_at_least("dy", dy, 1);
    check_.kernel_dtype("dy", dy);
    check_.shape("a", a, {-1, -1});
    const int64_t out_features = dy.size(-1), in_features = a.size(1);
    factors("dy", dy, in_features, out_features, a, b);
    magnitude(magnitudes, "dy", dy, out_features);
    per_row("norms", norms, "dy", dy, out_features);
    check_.dropout(dropout_p, rng, dy);
    const int64_t num_tokens = binding::flat_rows(dy).size(0);
    if (needs[0]) {
      present("weight", weight);
      like("weight", *weight, "dy", dy, {out_features, in_features});
    }
    if (needs[1] || needs[3]) {
      present("x", x);
      like("x", *x, "dy", dy, binding::shape_with_width(dy, in_features));
    }
    if (needs[4]) present("v", v);
    if (needs[5]) {
      present("z", z);
      like("z", *z, "dy", dy, {num_tokens, out_features});
      TORCH_CHECK_VALUE(z->is_contiguous(), op_, ": z: expected the forward's z, contiguous");
    }
  }

 private:
  void present(const char* name, const OptionalTensor& t) const {
    TORCH_CHECK_VALUE(t.has_value(), op_, ": ", name, ": expected a tensor for the gradients asked for, got None");
  }

  const char* op_;
  binding::Checks check_;
};

}  // namespace pylora::dora
