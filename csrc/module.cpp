// pylora._C: what was built, which instruction set is in use, and the ops' eager entry points, which cost 0.45 us a
// call where torch.ops costs 1.7 to 2.8. They go through the dispatcher: autograd, autocast and fake tensors see
// them.
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>
#include <vector>

#include "binding/status.h"
#include "cpu/isa.h"
#include "lora/call.h"

namespace py = pybind11;

namespace pylora {
namespace {

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts)
    text += (text.empty() ? "" : ",") + part;
  return text;
}

std::vector<std::string> isas_where(bool (*test)(Isa)) {
  std::vector<std::string> names;
  for (Isa isa : kAllIsas)
    if (test(isa)) names.push_back(isa_name(isa));
  return names;
}

std::map<std::string, std::string> build_info() {
  return {{"version", PYLORA_VERSION},         {"torch", PYLORA_TORCH_VERSION},
          {"source_hash", PYLORA_SOURCE_HASH}, {"cuda_archs", PYLORA_CUDA_ARCHS},
          {"compiler", __VERSION__},           {"isas_built", join(isas_where(isa_built))}};
}

std::string cpu_isa() {
  Isa isa;
  binding::throw_unless_ok(current_isa(&isa));
  return isa_name(isa);
}

}  // namespace
}  // namespace pylora

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace pylora;  // NOLINT: the module's own names
  using py::arg;
  m.attr("__version__") = PYLORA_VERSION;
  m.def("build_info", &build_info, "What this extension was built from and for.");
  m.def("cpu_isa", &cpu_isa, "The instruction set that CPU kernels use.");
  m.def("cpu_isas_supported", [] { return isas_where(isa_supported); }, "The instruction sets this CPU can run.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { binding::throw_unless_ok(set_isa(name.c_str())); }, arg("name"),
      "Switches all later CPU kernel launches of the process; tests and benchmarks use it.");

  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("lora_linear", &lora::call_linear, arg("x"), arg("weight"), arg("bias"), arg("a"), arg("b"), arg("scaling"),
        arg("dropout_p"), arg("rng"), no_gil);
  m.def("lora_add", &lora::call_add, arg("base"), arg("x"), arg("a"), arg("b"), arg("scaling"), arg("dropout_p"),
        arg("rng"), no_gil);
  m.def("lora_dropout", &lora::call_dropout, arg("x"), arg("dropout_p"), arg("rng"), no_gil);
}
