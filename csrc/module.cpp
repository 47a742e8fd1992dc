// pylora._C: what was built, which instruction set is in use, and the ops' eager entry points, which cost 0.45 us a
// call where torch.ops costs 1.7 to 2.8. They go through the dispatcher: autograd, autocast and fake tensors see
// them.
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>
#include <vector>

#include "bgmv/call.h"
#include "binding/dense_layer.h"
#include "binding/kernel_device.h"
#include "binding/status.h"
#include "cpu/isa.h"
#include "dora/call.h"
#include "dora/kept_norms.h"
#include "lanczos/call.h"
#include "lora/call.h"
#include "merge/call.h"
#include "multi_lora/multi_lora.h"
#include "select/call.h"
#include "sgmv/call.h"
#include "uniform/call.h"

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

  m.def("has_code_for_gpu", &binding::has_code_for_gpu, arg("index"),
        "Whether the kernels run on the GPU of this index.");

  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("lora_linear", &lora::call_linear, arg("x"), arg("weight"), arg("bias"), arg("a"), arg("b"), arg("scaling"),
        arg("dropout_p"), arg("rng"), no_gil);
  m.def("lora_add", &lora::call_add, arg("base"), arg("x"), arg("a"), arg("b"), arg("scaling"), arg("dropout_p"),
        arg("rng"), no_gil);
  if (PyModule_AddFunctions(m.ptr(), binding::dense_layer_functions()) < 0) throw py::error_already_set();
  m.def("lora_dropout", &lora::call_dropout, arg("x"), arg("dropout_p"), arg("rng"), no_gil);

  m.def("dora_row_squares", &dora::call_row_squares, arg("weight"), no_gil);
  m.def("dora_row_norms", &dora::call_row_norms, arg("weight"), arg("a"), arg("b"), arg("scaling"), no_gil);
  m.def("dora_linear", &dora::call_linear, arg("x"), arg("weight"), arg("bias"), arg("a"), arg("b"), arg("magnitude"),
        arg("norms"), arg("scaling"), arg("dropout_p"), arg("rng"), no_gil);
  m.def("dora_linear_norms", &dora::call_linear_norms, arg("x"), arg("weight"), arg("bias"), arg("a"), arg("b"),
        arg("magnitude"), arg("squares"), arg("scaling"), arg("dropout_p"), arg("rng"), no_gil);
  py::class_<dora::KeptNorms>(m, "KeptNorms", "See csrc/dora/kept_norms.h. A copy is empty.")
      .def(py::init<>())
      .def("find", &dora::KeptNorms::find, arg("weight"), arg("a"), arg("b"), arg("scaling"), arg("writes"),
           arg("trust"))
      .def("keep", &dora::KeptNorms::keep, arg("weight"), arg("a"), arg("b"), arg("scaling"), arg("writes"),
           arg("trust"), arg("norms"))
      .def("find_squares", &dora::KeptNorms::find_squares, arg("weight"), arg("writes"), arg("trust"))
      .def("keep_squares", &dora::KeptNorms::keep_squares, arg("weight"), arg("writes"), arg("trust"), arg("squares"))
      .def("clear", &dora::KeptNorms::clear)
      .def("__bool__", [](const dora::KeptNorms& kept) { return !kept.empty(); })
      .def(py::pickle([](const dora::KeptNorms&) { return py::tuple(); },
                      [](const py::tuple&) { return dora::KeptNorms(); }));
  m.def("bidiagonalise_", &lanczos::call_bidiagonalise, arg("matrix"), arg("basis"), arg("left"), arg("diagonal"),
        arg("above"), arg("locked"), arg("begin"), arg("end"), arg("seed"), no_gil);
  m.def("gram_product", &lanczos::call_gram_product, arg("matrix"), arg("x"), no_gil);
  m.def("ritz_residuals", &lanczos::call_ritz_residuals, arg("diagonal"), arg("above"), arg("rank"), no_gil);
  m.def("keep_largest", &select::call_keep_largest, arg("x"), arg("count"), no_gil);
  m.def("uniform_", &uniform::call_uniform, arg("out"), arg("bound"), arg("skip"), no_gil);
  m.def("sgmv_", &sgmv::eager_add, no_gil);
  m.def("sgmv_shrink", &sgmv::eager_shrink, no_gil);
  m.def("sgmv_expand_", &sgmv::eager_expand, no_gil);
  m.def("bgmv_", &bgmv::eager_add, no_gil);
  m.def("bgmv_shrink", &bgmv::eager_shrink, no_gil);
  m.def("bgmv_expand_", &bgmv::eager_expand, no_gil);
  m.def("multi_lora_linear", &multi_lora::eager_linear, no_gil);
  m.def("multi_lora_embedding_", &multi_lora::eager_embedding, no_gil);
  m.def("multi_lora_conv_", &multi_lora::eager_conv, no_gil);
  m.def("merge_", &merge::call_merge, arg("w"), arg("a"), arg("b"), arg("scalings"), arg("row_scales"), arg("log"),
        no_gil);
  m.def("unmerge_", &merge::call_unmerge, arg("w"), arg("a"), arg("b"), arg("scalings"), arg("row_scales"), arg("log"),
        no_gil);
  m.def("swap_", &merge::call_swap, arg("w"), arg("old_a"), arg("old_b"), arg("old_scalings"), arg("old_row_scales"),
        arg("old_log"), arg("a"), arg("b"), arg("scalings"), arg("row_scales"), arg("log"), no_gil);
  m.def("merge_is_finite", &merge::call_is_finite, arg("w"), arg("a"), arg("b"), arg("scalings"), arg("row_scales"),
        no_gil);
}
