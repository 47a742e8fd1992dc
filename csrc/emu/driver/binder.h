// Makes a launcher a Python function of keyword arguments, one for each field of its argument struct. A tensor stands
// for its address; it becomes a region that the kernels may touch, for writing only if the field's type says so. Where
// that memory is and how a launch ends, `Call` says: emulated.h, or on_device.h for a GPU.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/context.h"
#include "common/dtype.h"
#include "common/matrix.h"
#include "common/philox.h"
#include "common/status.h"
#if defined(PYLORA_EMULATE)
#include "emu/driver/emulated.h"
#else
#include "emu/driver/on_device.h"
#endif

namespace pylora::emu {

template <class T>
void assign(T*& field, py::handle tensor, std::vector<Region>& regions) {
  field = reinterpret_cast<T*>(address_of(tensor, !std::is_const_v<T>, regions));
}

/// A tensor of two dimensions (or one: a single row).
template <class Pointer>
void assign(Matrix<Pointer>& field, py::handle tensor, std::vector<Region>& regions) {
  assign(field.data, tensor, regions);
  if (tensor.is_none()) return;
  const bool rows = tensor.attr("dim")().cast<int>() == 2;
  field.row_stride = rows ? tensor.attr("stride")(0).cast<int64_t>() : 0;
  field.column_stride = tensor.attr("stride")(-1).cast<int64_t>();
}

/// (p, rng): the probability and the int64 [2] tensor of seed and offset.
inline void assign(Dropout& field, py::handle value, std::vector<Region>& regions) {
  const auto pair = value.cast<std::pair<double, py::object>>();
  const int64_t* rng = nullptr;
  assign(rng, pair.second, regions);
  field = make_dropout(pair.first, rng);
}

/// "float32" and so on, as str(dtype) without "torch.", or a torch.dtype.
inline void assign(DType& field, py::handle value, std::vector<Region>&) {
  static const std::map<std::string, DType> names = {{"torch.float32", DType::f32},
                                                     {"torch.bfloat16", DType::bf16},
                                                     {"torch.float16", DType::f16},
                                                     {"torch.float64", DType::f64}};
  const auto found = names.find(py::str(value).cast<std::string>());
  if (found == names.end()) throw py::type_error("dtype: expected a floating torch.dtype");
  field = found->second;
}

template <class T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
void assign(T& field, py::handle value, std::vector<Region>&) {
  field = value.cast<T>();
}

/// The fields of `Args` by name.
template <class Args>
class Fields {
 public:
  template <class T>
  Fields& field(const char* name, T Args::* member) {
    return set(name, [member](Args& args, py::handle value, std::vector<Region>& regions) {
      assign(args.*member, value, regions);
    });
  }

  /// A field of a struct within the arguments, such as `shape`.
  template <class Inner, class T>
  Fields& field(const char* name, Inner Args::* outer, T Inner::* member) {
    return set(name, [outer, member](Args& args, py::handle value, std::vector<Region>& regions) {
      assign(args.*outer.*member, value, regions);
    });
  }

  using Setter = std::function<void(Args&, py::handle, std::vector<Region>&)>;
  /// Anything else: setter(args, value, regions).
  Fields& set(const char* name, Setter setter) {
    setters_[name] = std::move(setter);
    return *this;
  }

  Args parse(const py::kwargs& values, std::vector<Region>& regions) const {
    Args args;
    for (const auto& [name, value] : values) {
      const auto found = setters_.find(name.template cast<std::string>());
      if (found == setters_.end()) throw py::type_error("no such field: " + name.template cast<std::string>());
      found->second(args, value, regions);
    }
    return args;
  }

 private:
  std::map<std::string, Setter> setters_;
};

/// module.name(**fields): runs the launcher; `stream`, an address, is Context's. Raises RuntimeError for a Status that is
/// not ok, and for what the launcher could not know when it returned.
template <class Args>
void def_launcher(py::module_& module, const char* name, const Fields<Args>& fields,
                  Status (*launcher)(const Context&, const Args&)) {
  module.def(name, [fields, launcher](py::kwargs values) {
    Call call;
    Context context;
    if (values.contains("stream"))
      context.stream = reinterpret_cast<void*>(values.attr("pop")("stream").cast<uintptr_t>());
    const Args args = fields.parse(values, call.regions());
    const Status status = launcher(context, args);
    if (!status.is_ok()) throw std::runtime_error(status.message);
    call.finish();
  });
}

/// module.name(**fields): the value of a pure function of the arguments, such as a workspace's size.
template <class Args, class Result>
void def_function(py::module_& module, const char* name, const Fields<Args>& fields, Result (*function)(const Args&)) {
  module.def(name, [fields, function](const py::kwargs& values) {
    std::vector<Region> regions;
    return function(fields.parse(values, regions));
  });
}

/// Adds a submodule to the driver when the library is loaded: one at namespace scope in each <op>.cpp of this folder.
struct Registration {
  Registration(const char* name, void (*define)(py::module_&));
};

}  // namespace pylora::emu
