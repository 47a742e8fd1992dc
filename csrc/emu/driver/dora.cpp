#include "dora/dora.h"

#include "dora/heuristics.h"
#include "emu/driver/binder.h"

namespace pylora::emu {
namespace {

using namespace pylora::dora;

void define_norms(py::module_& module) {
  Fields<SquaresArgs> squares;
  squares.field("out_features", &SquaresArgs::out_features)
      .field("in_features", &SquaresArgs::in_features)
      .field("dtype", &SquaresArgs::dtype)
      .field("weight", &SquaresArgs::weight)
      .field("squares", &SquaresArgs::squares);
  def_launcher(module, "squares", squares, &squares_cuda);

  Fields<NormsArgs> norms;
  norms.field("out_features", &NormsArgs::out_features)
      .field("in_features", &NormsArgs::in_features)
      .field("rank", &NormsArgs::rank)
      .field("dtype", &NormsArgs::dtype)
      .field("factor_dtype", &NormsArgs::factor_dtype)
      .field("scaling", &NormsArgs::scaling)
      .field("weight", &NormsArgs::weight)
      .field("a", &NormsArgs::a)
      .field("b", &NormsArgs::b)
      .field("norms", &NormsArgs::norms)
      .field("workspace", &NormsArgs::workspace);
  def_launcher(module, "norms", norms, &norms_cuda);
  def_function(
      module, "norms_counter_bytes", norms, +[](const NormsArgs& args) { return norms_counter_bytes_cuda(args); });
  def_function(
      module, "norms_workspace_bytes", norms, +[](const NormsArgs& args) { return norms_workspace_bytes_cuda(args); });
}

template <class Args>
Fields<Args> scale_fields() {
  Fields<Args> fields;
  fields.field("num_tokens", &Args::num_tokens)
      .field("out_features", &Args::out_features)
      .field("dtype", &Args::dtype)
      .field("magnitude_dtype", &Args::magnitude_dtype)
      .field("magnitude", &Args::magnitude)
      .field("norms", &Args::norms)
      .field("z", &Args::z);
  return fields;
}

void define(py::module_& module) {
  define_norms(module);
  Fields<ScaleArgs> scale = scale_fields<ScaleArgs>();
  scale.field("rest", &ScaleArgs::rest).field("bias", &ScaleArgs::bias).field("y", &ScaleArgs::y);
  def_launcher(module, "scale", scale, &scale_cuda);

  Fields<ScaleBackwardArgs> backward = scale_fields<ScaleBackwardArgs>();
  backward.field("dy", &ScaleBackwardArgs::dy)
      .field("dz", &ScaleBackwardArgs::dz)
      .field("dmagnitude", &ScaleBackwardArgs::dmagnitude)
      .field("workspace", &ScaleBackwardArgs::workspace);
  def_launcher(module, "scale_backward", backward, &scale_backward_cuda);
  def_function(
      module, "scale_counter_bytes", backward,
      +[](const ScaleBackwardArgs& args) { return scale_counter_bytes_cuda(args); });
  def_function(
      module, "scale_workspace_bytes", backward,
      +[](const ScaleBackwardArgs& args) { return scale_backward_workspace_bytes_cuda(args); });
}

const Registration registration("dora", &define);

}  // namespace
}  // namespace pylora::emu
