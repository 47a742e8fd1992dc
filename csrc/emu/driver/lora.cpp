#include "lora/lora.h"
#include "emu/driver/binder.h"
#include "lora/heuristics.h"

namespace pylora::emu {
namespace {

using namespace pylora::lora;

template <class Args>
Fields<Args> shape_fields() {
  Fields<Args> fields;
  fields.field("num_tokens", &Args::shape, &Shape::num_tokens)
      .field("in_features", &Args::shape, &Shape::in_features)
      .field("out_features", &Args::shape, &Shape::out_features)
      .field("rank", &Args::shape, &Shape::rank)
      .field("dtype", &Args::shape, &Shape::dtype)
      .field("factor_dtype", &Args::shape, &Shape::factor_dtype);
  return fields;
}

template <int64_t (*function)(const Shape&)>
int64_t of_shape(const ForwardArgs& args) {
  return function(args.shape);
}

void define(py::module_& module) {
  Fields<DropoutArgs> dropout;
  dropout.field("num_tokens", &DropoutArgs::num_tokens)
      .field("width", &DropoutArgs::width)
      .field("dtype", &DropoutArgs::dtype)
      .field("dropout", &DropoutArgs::dropout)
      .field("x", &DropoutArgs::x)
      .field("out", &DropoutArgs::out);
  def_launcher(module, "dropout", dropout, &dropout_cuda);

  Fields<ForwardArgs> forward = shape_fields<ForwardArgs>();
  forward.field("scaling", &ForwardArgs::scaling)
      .field("dropout", &ForwardArgs::dropout)
      .field("x", &ForwardArgs::x)
      .field("a", &ForwardArgs::a)
      .field("b", &ForwardArgs::b)
      .field("y", &ForwardArgs::y)
      .field("v", &ForwardArgs::v)
      .field("workspace", &ForwardArgs::workspace);
  def_launcher(module, "forward", forward, &forward_cuda);

  Fields<BackwardArgs> backward = shape_fields<BackwardArgs>();
  backward.field("scaling", &BackwardArgs::scaling)
      .field("dropout", &BackwardArgs::dropout)
      .field("dy", &BackwardArgs::dy)
      .field("x", &BackwardArgs::x)
      .field("a", &BackwardArgs::a)
      .field("b", &BackwardArgs::b)
      .field("g", &BackwardArgs::g)
      .field("v", &BackwardArgs::v)
      .field("dx", &BackwardArgs::dx)
      .field("da", &BackwardArgs::da)
      .field("db", &BackwardArgs::db)
      .field("workspace", &BackwardArgs::workspace);
  def_launcher(module, "backward", backward, &backward_cuda);

  const Fields<ForwardArgs> shape = shape_fields<ForwardArgs>();
  def_function(module, "counter_bytes", shape, &of_shape<&counter_bytes_cuda>);
  def_function(module, "forward_workspace_bytes", shape, &of_shape<&forward_workspace_bytes_cuda>);
  def_function(module, "backward_workspace_bytes", shape, &of_shape<&backward_workspace_bytes_cuda>);
}

const Registration registration("lora", &define);

}  // namespace
}  // namespace pylora::emu
