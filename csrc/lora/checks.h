// Argument checks of the lora ops, forward and backward: both are public through torch.ops, and a parameter's `.data`
// may have been exchanged between the two.
#pragma once

#include <vector>

#include "binding/checks.h"
#include "lora/aten.h"

namespace pylora::lora {

class LoraChecks {
 public:
  explicit LoraChecks(const char* op) : op_(op), check_(op) {}

  /// like: a tensor of the activations' dtype and device, called like_name in messages.
  void factors(const char* like_name, const Tensor& like, int64_t in_features, int64_t out_features, const Tensor& a,
               const Tensor& b) const {
    check_.kernel_dtype(like_name, like);
    check_.kernel_dtype("a", a);
    check_.shape("a", a, {-1, in_features});
    check_.shape("b", b, {out_features, a.size(0)});
    TORCH_CHECK_VALUE(a.size(0) >= 1, op_, ": a: expected a rank of at least 1, got shape ", a.sizes());
    check_.same_dtype("b", b, "a", a);
    check_.same_device("a", a, like_name, like);
    check_.same_device("b", b, like_name, like);
  }

  void like(const char* name, const Tensor& t, const char* like_name, const Tensor& like, at::IntArrayRef shape) const {
    check_.shape(name, t, shape);
    check_.same_dtype(name, t, like_name, like);
    check_.same_device(name, t, like_name, like);
  }

  void linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a, const Tensor& b,
              double dropout_p, const OptionalTensor& rng) const {
    check_.dim_at_least("x", x, 1);
    like("weight", weight, "x", x, {-1, x.size(-1)});
    if (bias) like("bias", *bias, "x", x, {weight.size(0)});
    factors("x", x, x.size(-1), weight.size(0), a, b);
    check_.dropout(dropout_p, rng, x);
  }

  /// A number for each output, in f32, or f64 where x is.
  void factor(const Tensor& factor, const Tensor& x, int64_t out_features) const {
    check_.shape("factor", factor, {out_features});
    check_.same_device("factor", factor, "x", x);
    const at::ScalarType dtype = binding::accumulator_type(x.scalar_type());
    TORCH_CHECK_TYPE(factor.scalar_type() == dtype, op_, ": factor: expected ", dtype, ", got ", factor.scalar_type());
    TORCH_CHECK_VALUE(factor.is_contiguous(), op_, ": factor: expected a contiguous tensor");
  }

  void add(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b, double dropout_p,
           const OptionalTensor& rng) const {
    check_.dim_at_least("x", x, 1);
    like("base", base, "x", x, aten::with_width(x, -1));
    factors("x", x, x.size(-1), base.size(-1), a, b);
    check_.dropout(dropout_p, rng, x);
  }

  /// What the delta's backward reads: x for da, v for db.
  void delta_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& a, const Tensor& b,
                      const OptionalTensor& v, double dropout_p, const OptionalTensor& rng, bool need_x,
                      bool need_v) const {
    check_.dim_at_least("dy", dy, 1);
    check_.shape("a", a, {-1, -1});
    factors("dy", dy, a.size(1), dy.size(-1), a, b);
    check_.dropout(dropout_p, rng, dy);
    if (need_x) {
      present("x", x);
      like("x", *x, "dy", dy, aten::with_width(dy, a.size(1)));
    }
    if (need_v) {
      present("v", v);
      check_.shape("v", *v, {aten::rows(dy).size(0), a.size(0)});
      check_.same_device("v", *v, "dy", dy);
      TORCH_CHECK_TYPE(v->scalar_type() == binding::accumulator_type(dy.scalar_type()) && v->is_contiguous(), op_,
                       ": v: expected the forward's v, contiguous and of the accumulator's dtype, got ",
                       v->scalar_type());
    }
  }

  void base_backward(const Tensor& dy, const OptionalTensor& weight, const Tensor& a) const {
    present("weight", weight);
    like("weight", *weight, "dy", dy, {dy.size(-1), a.size(1)});
  }

 private:
  void present(const char* name, const OptionalTensor& t) const {
    TORCH_CHECK_VALUE(t.has_value(), op_, ": ", name, ": expected a tensor for the gradients asked for, got None");
  }

  const char* op_;
  binding::Checks check_;
};

}  // namespace pylora::lora
