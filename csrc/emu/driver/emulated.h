// A launch in the emulator: tensors are where they are, and the machine is told what kernels may touch.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "emu/machine.h"

namespace pylora::emu {

namespace py = pybind11;

/// The tensor's address; its whole storage is added to `regions`. None is a null pointer.
inline uintptr_t address_of(py::handle tensor, bool writable, std::vector<Region>& regions) {
  if (tensor.is_none()) return 0;
  const auto storage = tensor.attr("untyped_storage")();
  const auto begin = storage.attr("data_ptr")().cast<uintptr_t>();
  regions.push_back({begin, begin + storage.attr("nbytes")().cast<uintptr_t>(), writable});
  return tensor.attr("data_ptr")().cast<uintptr_t>();
}

/// One call of a launcher.
class Call {
 public:
  Call() : launches_before_(machine().launches.size()) { machine().regions.clear(); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() { machine().regions.clear(); }

  std::vector<Region>& regions() { return machine().regions; }

  /// Throws for a trap whose Status the launcher dropped.
  void finish() const {
    const std::vector<LaunchRecord>& launches = machine().launches;
    for (size_t i = launches_before_; i < launches.size(); ++i) {
      if (!launches[i].error.empty()) throw std::runtime_error("the launcher returned ok after: " + launches[i].error);
    }
  }

 private:
  size_t launches_before_;
};

}  // namespace pylora::emu
