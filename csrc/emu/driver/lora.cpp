#include "lora/lora.h"
#include "emu/driver/binder.h"

namespace pylora::emu {
namespace {

using namespace pylora::lora;

void define(py::module_& module) {
  Fields<DropoutArgs> dropout;
  dropout.field("num_tokens", &DropoutArgs::num_tokens)
      .field("width", &DropoutArgs::width)
      .field("dtype", &DropoutArgs::dtype)
      .field("dropout", &DropoutArgs::dropout)
      .field("x", &DropoutArgs::x)
      .field("out", &DropoutArgs::out);
  def_launcher(module, "dropout", dropout, &dropout_cuda);
}

const Registration registration("lora", &define);

}  // namespace
}  // namespace pylora::emu
