// What a dense layer's forward takes, read from the layer's modules through their dictionaries.
//
// The eager counterpart of pylora/layers/fused.py's `read`, which says the same in Python for torch.compile to trace: the
// tests hold one to the other (tests/layers/test_linear_fused.py).
//
// Nothing is kept between calls, so nothing can be stale: what the layer holds is looked up at every call, by keys
// whose hashes Python keeps in them. A layer is read with the GIL held and without running any Python code or torch
// operator, so that references can be borrowed until its tensors are owned.
#pragma once

#include <ATen/autocast_mode.h>
#include <c10/core/DynamicCast.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <utility>
#include <vector>

#include "binding/dtype.h"
#include "binding/kernel_device.h"

namespace pylora::binding {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// A new reference, given back.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (!object) throw python_error();
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

/// The objects of Python that a call compares with or looks up by; made once and never given back.
struct Known {
  // Of torch.nn.modules.module: dictionaries of hooks that all modules' calls run.
  std::vector<PyObject*> global_hooks;
  PyTypeObject *linear, *identity, *dropout;
  PyObject *conv1d_module, *conv1d;
  // Keys of modules' dictionaries.
  PyObject* modules = interned("_modules");
  PyObject* parameters = interned("_parameters");
  PyObject* forward_hooks = interned("_forward_hooks");
  PyObject* forward_pre_hooks = interned("_forward_pre_hooks");
  PyObject* backward_hooks = interned("_backward_hooks");
  PyObject* backward_pre_hooks = interned("_backward_pre_hooks");
  PyObject* forward = interned("forward");
  PyObject* base_layer = interned("base_layer");
  PyObject* lora_a = interned("lora_A");
  PyObject* lora_b = interned("lora_B");
  PyObject* lora_dropout = interned("lora_dropout");
  PyObject* lora_magnitude_vector = interned("lora_magnitude_vector");
  PyObject* kept_norms = interned("_kept_norms");
  PyObject* weight = interned("weight");
  PyObject* bias = interned("bias");
  PyObject* scaling = interned("scaling");
  PyObject* training = interned("training");
  PyObject* inplace = interned("inplace");
  PyObject* p = interned("p");
  PyObject* in_features = interned("in_features");
  PyObject* cast_input_dtype_enabled = interned("cast_input_dtype_enabled");
  PyObject* lora_variant = interned("lora_variant");
  PyObject* fused_forward = interned("fused_forward");
  PyObject* merged_adapters = interned("merged_adapters");
  PyObject* active_adapter = interned("_active_adapter");
  PyObject* disable_adapters = interned("_disable_adapters");

  Known() {
    const Owned module(PyImport_ImportModule("torch.nn.modules.module"));
    for (const char* name :
         {"_global_backward_pre_hooks", "_global_backward_hooks", "_global_forward_pre_hooks", "_global_forward_hooks",
          "_global_forward_hooks_always_called", "_global_forward_hooks_with_kwargs"})
      global_hooks.push_back(Owned(PyObject_GetAttrString(module.get(), name)).release());
    const Owned nn(PyImport_ImportModule("torch.nn"));
    linear = type_of(nn.get(), "Linear");
    identity = type_of(nn.get(), "Identity");
    dropout = type_of(nn.get(), "Dropout");
    conv1d_module = interned("transformers.pytorch_utils");
    conv1d = interned("Conv1D");
  }

 private:
  static PyObject* interned(const char* text) { return Owned(PyUnicode_InternFromString(text)).release(); }

  static PyTypeObject* type_of(PyObject* module, const char* name) {
    return reinterpret_cast<PyTypeObject*>(Owned(PyObject_GetAttrString(module, name)).release());
  }
};

inline const Known& known() {
  static const Known objects;
  return objects;
}

/// The entry, borrowed, or null where there is none, or no dictionary.
inline PyObject* item(PyObject* dict, PyObject* key) {
  if (!dict || !PyDict_Check(dict)) return nullptr;
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw python_error();
  return value;
}

/// An object's own attributes, borrowed from it; null where it has none.
inline PyObject* attributes(PyObject* object) {
  PyObject* dict = object ? PyObject_GenericGetDict(object, nullptr) : nullptr;
  if (!dict) {
    PyErr_Clear();
    return nullptr;
  }
  Py_DECREF(dict);  // the object has it too
  return dict;
}

inline bool is_empty_dict(PyObject* object) { return object && PyDict_Check(object) && PyDict_GET_SIZE(object) == 0; }

inline bool is_number(PyObject* object) { return object && (PyFloat_CheckExact(object) || PyLong_CheckExact(object)); }

inline double as_number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw python_error();
  return value;
}

inline const Tensor* plain_tensor(PyObject* object) {
  return object && THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

/// Whether torch has to see the single calls: global module hooks, and transforms that the ops have no rule for
/// (torch.func's, forward-mode differentiation).
inline bool calls_are_observed() {
  for (PyObject* hooks : known().global_hooks)
    if (!is_empty_dict(hooks)) return true;
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

/// A module's own attributes, if calling it does no more than its class's forward; else null.
inline PyObject* unhooked(PyObject* module) {
  const Known& k = known();
  PyObject* own = attributes(module);
  if (!own || item(own, k.forward)) return nullptr;
  for (PyObject* key : {k.forward_hooks, k.forward_pre_hooks, k.backward_hooks, k.backward_pre_hooks}) {
    if (!is_empty_dict(item(own, key))) return nullptr;
  }
  return own;
}

/// transformers' Conv1D, which keeps its weight transposed.
inline bool is_conv1d(PyObject* module) {
  PyObject* transformers = PyImport_GetModule(known().conv1d_module);
  if (!transformers) {
    if (PyErr_Occurred()) throw python_error();
    return false;
  }
  const Owned owned(transformers);
  const Owned type(PyObject_GetAttr(transformers, known().conv1d));
  return reinterpret_cast<PyObject*>(Py_TYPE(module)) == type.get();
}

/// What a forward's op takes; the adapters' in columns, as pylora/layers/fused.py's Operands.
struct Operands {
  Tensor stored_weight;
  bool transposed = false;
  OptionalTensor bias;
  std::vector<Tensor> a, b;
  std::vector<double> scalings, dropout_ps;
  int variants = 0;  // adapters with one
  // The first adapter's, borrowed from the layer: its name, variant, and module in lora_magnitude_vector, or null.
  PyObject *first_name = nullptr, *first_variant = nullptr, *first_magnitudes = nullptr;

  Tensor weight() const { return transposed ? stored_weight.t() : stored_weight; }
};

/// Reads one layer for one forward. Each step is false where the modules have to be called instead of an op.
class Reader {
 public:
  Reader(PyObject* layer, const Tensor& x) : k_(known()), layer_(layer), own_(attributes(layer)), x_(x) {
    modules_ = item(own_, k_.modules);
  }

  bool adds_adapters() const {
    PyObject* merged = item(own_, k_.merged_adapters);
    return merged && PyList_CheckExact(merged) && PyList_GET_SIZE(merged) == 0 &&
           item(own_, k_.disable_adapters) == Py_False;
  }

  bool read_base(Operands* out) {
    PyObject* base = item(modules_, k_.base_layer);
    if (!base) return false;
    out->transposed = Py_TYPE(base) != k_.linear;
    if (out->transposed && !is_conv1d(base)) return false;
    PyObject* parameters = item(unhooked(base), k_.parameters);
    const Tensor* weight = plain_tensor(item(parameters, k_.weight));
    if (!weight || !is_kernel_dtype(weight->scalar_type()) || !fits(*weight)) return false;
    PyObject* bias = item(parameters, k_.bias);
    if (bias && bias != Py_None) {
      const Tensor* tensor = plain_tensor(bias);
      if (!tensor || !is_beside_x(*tensor)) return false;
      out->bias = *tensor;
    }
    dtype_ = weight->scalar_type();
    out->stored_weight = *weight;
    return true;
  }

  /// names: a name, or a list or tuple of names, of which those that are not here are passed over.
  bool read_adapters(PyObject* names, Operands* out) {
    a_modules_ = modules_of(k_.lora_a);
    b_modules_ = modules_of(k_.lora_b);
    dropouts_ = modules_of(k_.lora_dropout);
    scalings_ = item(own_, k_.scaling);
    variants_ = item(own_, k_.lora_variant);
    if (!names || !a_modules_ || !scalings_ || !variants_) return false;
    if (PyUnicode_CheckExact(names)) return read_adapter(names, out) && !out->a.empty();
    if (!PyList_CheckExact(names) && !PyTuple_CheckExact(names)) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(names);
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!read_adapter(PySequence_Fast_GET_ITEM(names, i), out)) return false;
    return !out->a.empty();
  }

  PyObject* active_adapters() const { return item(own_, k_.active_adapter); }

 private:
  /// The modules in one of the layer's containers, by adapter.
  PyObject* modules_of(PyObject* container) const { return item(attributes(item(modules_, container)), k_.modules); }

  /// Whether the op can take x beside this weight; autocast brings the two to one dtype, but leaves f64 alone.
  bool fits(const Tensor& weight) const {
    if (!kernels_serve(x_.device()) || !is_beside_x(weight) || x_.is_nested() || x_.dim() == 0) return false;
    PyObject* in_features = item(own_, k_.in_features);
    if (!in_features || !PyLong_CheckExact(in_features) || PyLong_AsLongLong(in_features) != x_.size(-1)) return false;
    const at::ScalarType x_dtype = x_.scalar_type(), dtype = weight.scalar_type();
    return x_dtype == dtype ||
           (at::autocast::is_autocast_enabled(x_.device().type()) && x_dtype != at::kDouble && dtype != at::kDouble);
  }

  bool is_beside_x(const Tensor& t) const { return t.device() == x_.device(); }

  /// The weight of an unhooked nn.Linear without a bias; else null.
  const Tensor* factor(PyObject* module) const {
    if (!module || Py_TYPE(module) != k_.linear) return nullptr;
    PyObject* parameters = item(unhooked(module), k_.parameters);
    PyObject* bias = item(parameters, k_.bias);
    if (bias && bias != Py_None) return nullptr;
    return plain_tensor(item(parameters, k_.weight));
  }

  bool read_adapter(PyObject* name, Operands* out) {
    if (!PyUnicode_CheckExact(name)) return false;
    PyObject* a_module = item(a_modules_, name);
    if (!a_module) return true;
    const Tensor *a = factor(a_module), *b = factor(item(b_modules_, name));
    if (!a || !b || a->scalar_type() != b->scalar_type() || !is_beside_x(*a) || !is_beside_x(*b)) return false;
    if (a->scalar_type() != dtype_ && (a->scalar_type() != at::kFloat || !casts_input())) return false;
    double scaling, p;
    if (!read_scaling(item(scalings_, name), &scaling) || !read_dropout(item(dropouts_, name), &p)) return false;
    PyObject* variant = PyDict_GET_SIZE(variants_) > 0 ? item(variants_, name) : nullptr;
    if (out->a.empty()) {
      out->first_name = name;
      out->first_variant = variant;
      if (variant) out->first_magnitudes = item(modules_of(k_.lora_magnitude_vector), name);
    }
    out->variants += variant != nullptr;
    out->a.push_back(*a);
    out->b.push_back(*b);
    out->scalings.push_back(scaling);
    out->dropout_ps.push_back(p);
    return true;
  }

  bool casts_input() const { return item(own_, k_.cast_input_dtype_enabled) == Py_True; }

  bool read_scaling(PyObject* value, double* scaling) const {
    if (is_number(value)) {
      *scaling = as_number(value);
      return true;
    }
    if (!value || reinterpret_cast<PyObject*>(Py_TYPE(value)) != THPVariableClass) return false;
    const Tensor& tensor = THPVariable_Unpack(value);
    // One that trains has to be in the graph.
    if (tensor.requires_grad() || !tensor.is_cpu() || tensor.layout() != at::kStrided || tensor.numel() != 1)
      return false;
    *scaling = c10::fetch_and_cast<double>(tensor.scalar_type(), tensor.const_data_ptr());
    return true;
  }

  bool read_dropout(PyObject* module, double* p) const {
    *p = 0;
    if (!module || (Py_TYPE(module) != k_.identity && Py_TYPE(module) != k_.dropout)) return false;
    PyObject* own = unhooked(module);
    if (!own) return false;
    if (Py_TYPE(module) == k_.identity || item(own, k_.training) == Py_False) return true;
    PyObject* value = item(own, k_.p);
    if (!is_number(value) || item(own, k_.inplace) != Py_False) return false;
    *p = as_number(value);
    return *p < 1.0;
  }

  const Known& k_;
  PyObject* layer_;
  PyObject* own_;
  const Tensor& x_;
  PyObject* modules_;
  PyObject *a_modules_ = nullptr, *b_modules_ = nullptr, *dropouts_ = nullptr;
  PyObject *scalings_ = nullptr, *variants_ = nullptr;
  at::ScalarType dtype_ = at::kFloat;
};

}  // namespace pylora::binding
