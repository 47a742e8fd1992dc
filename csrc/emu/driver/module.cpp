// The Python modules `_emulated` and `_on_device`: a submodule of launchers for each op, and what is to be said of the
// device, which is the emulated one with its settings and records or the GPU.
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "emu/driver/binder.h"

namespace pylora::emu {
namespace {

using Define = void (*)(py::module_&);

std::vector<std::pair<const char*, Define>>& registrations() {
  static std::vector<std::pair<const char*, Define>> all;
  return all;
}

#if defined(PYLORA_EMULATE)
py::dict to_dict(const LaunchRecord& record) {
  py::dict dict;
  dict["kernel"] = record.kernel;
  dict["blocks"] = record.blocks;
  dict["threads"] = record.threads;
  dict["shared_bytes"] = record.shared_bytes;
  dict["load_bytes"] = record.load_bytes;
  dict["store_bytes"] = record.store_bytes;
  dict["load_sectors"] = record.load_sectors;
  dict["store_sectors"] = record.store_sectors;
  dict["atomics"] = record.atomics;
  dict["mma"] = record.mma;
  dict["ldmatrix"] = record.ldmatrix;
  dict["cp_async"] = record.cp_async;
  dict["barriers"] = record.barriers;
  dict["spins"] = record.spins;
  dict["error"] = record.error;
  return dict;
}

void configure(uint64_t order, int resident_blocks, int multiprocessors, size_t max_shared_bytes, bool check_regions) {
  if (resident_blocks < 1) throw py::value_error("resident_blocks: expected at least 1");
  machine().config = {order, resident_blocks, multiprocessors, max_shared_bytes, check_regions};
}

/// What was launched since the last call.
std::vector<py::dict> take_launches() {
  std::vector<py::dict> records;
  for (const LaunchRecord& record : machine().launches)
    records.push_back(to_dict(record));
  machine().launches.clear();
  return records;
}

void define_device(py::module_& module) {
#if defined(__SANITIZE_ADDRESS__)
  module.attr("sanitizer") = "address";
#elif defined(__SANITIZE_THREAD__)
  module.attr("sanitizer") = "thread";
#else
  module.attr("sanitizer") = "";
#endif
  const Config defaults;
  module.def(
      "configure", &configure, py::kw_only(), py::arg("order") = defaults.order,
      py::arg("resident_blocks") = defaults.resident_blocks, py::arg("multiprocessors") = defaults.multiprocessors,
      py::arg("max_shared_bytes") = defaults.max_shared_bytes, py::arg("check_regions") = defaults.check_regions);
  module.def("take_launches", &take_launches);
}
#else
/// Why nothing can run, or "".
std::string unusable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? "" : "no GPU";
}

void define_device(py::module_& module) {
  module.def("unusable", &unusable);
  module.def("synchronize", [] { throw_unless_success(cudaDeviceSynchronize(), "synchronize"); });
}
#endif

}  // namespace

Registration::Registration(const char* name, void (*define)(py::module_&)) {
  registrations().emplace_back(name, define);
}

}  // namespace pylora::emu

#if defined(PYLORA_EMULATE)
PYBIND11_MODULE(_emulated, module) {
#else
PYBIND11_MODULE(_on_device, module) {
#endif
  using namespace pylora::emu;
  define_device(module);
  for (const auto& [name, define] : registrations()) {
    py::module_ submodule = module.def_submodule(name);
    define(submodule);
  }
}
