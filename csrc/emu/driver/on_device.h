// A launch on a GPU. A tensor of the CPU is copied there, whole storage into an allocation of its own of just that size
// (compute-sanitizer then sees every access beside it), and copied back afterwards if the field may be written. A tensor
// that is there already is used as it is, queued on the caller's stream and not waited for: for graphs and benchmarks.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace pylora::emu {

namespace py = pybind11;

/// A storage of the CPU, and its copy on the device.
struct Region {
  uintptr_t begin = 0, end = 0;
  bool writable = false;
  uintptr_t copy = 0;
};

inline void throw_unless_success(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

/// The region of a storage, copied to the device when it is first met: two fields may share one.
inline Region& region_of(uintptr_t begin, size_t bytes, std::vector<Region>& regions) {
  for (Region& region : regions) {
    if (region.begin == begin) return region;
  }
  void* copy = nullptr;
  throw_unless_success(cudaMalloc(&copy, bytes), "cudaMalloc");
  regions.push_back({begin, begin + bytes, false, reinterpret_cast<uintptr_t>(copy)});
  throw_unless_success(cudaMemcpy(copy, reinterpret_cast<const void*>(begin), bytes, cudaMemcpyHostToDevice),
                       "copy to the device");
  return regions.back();
}

/// The tensor's address on the device. None, and a tensor without memory, is a null pointer.
inline uintptr_t address_of(py::handle tensor, bool writable, std::vector<Region>& regions) {
  if (tensor.is_none()) return 0;
  const auto address = tensor.attr("data_ptr")().cast<uintptr_t>();
  if (tensor.attr("is_cuda").cast<bool>()) return address;
  const auto storage = tensor.attr("untyped_storage")();
  const auto begin = storage.attr("data_ptr")().cast<uintptr_t>();
  const auto bytes = storage.attr("nbytes")().cast<size_t>();
  if (bytes == 0) return 0;
  Region& region = region_of(begin, bytes, regions);
  region.writable = region.writable || writable;
  return region.copy + (address - begin);
}

/// One call of a launcher.
class Call {
 public:
  Call() = default;
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    for (const Region& region : regions_)
      cudaFree(reinterpret_cast<void*>(region.copy));
  }

  std::vector<Region>& regions() { return regions_; }

  /// Waits where tensors were copied. Throws for an error inside a kernel.
  void finish() const {
    if (regions_.empty()) return;
    throw_unless_success(cudaDeviceSynchronize(), "the launcher returned ok, then");
    for (const Region& region : regions_) {
      if (!region.writable) continue;
      throw_unless_success(cudaMemcpy(reinterpret_cast<void*>(region.begin), reinterpret_cast<const void*>(region.copy),
                                      region.end - region.begin, cudaMemcpyDeviceToHost),
                           "copy from the device");
    }
  }

 private:
  std::vector<Region> regions_;
};

}  // namespace pylora::emu
