// The eager counterpart of pylora/layers/fused.py, which says the same in Python for torch.compile to trace: the tests
// hold one to the other (tests/layers/test_linear_fused.py).
//
// Nothing is kept between calls, so nothing can be stale: what the layer holds is looked up at every call, by keys
// whose hashes Python keeps in them. A layer is read with the GIL held and without running any Python code or torch
// operator, so that references can be borrowed until its tensors are owned.
#include "binding/dense_layer.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/randint.h>
#include <c10/core/DynamicCast.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "binding/dtype.h"
#include "lora/call.h"
#include "multi_lora/multi_lora.h"

namespace pylora::binding {
namespace {

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

const Known& known() {
  static const Known objects;
  return objects;
}

/// The entry, borrowed, or null where there is none, or no dictionary.
PyObject* item(PyObject* dict, PyObject* key) {
  if (!dict || !PyDict_Check(dict)) return nullptr;
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw python_error();
  return value;
}

/// An object's own attributes, borrowed from it; null where it has none.
PyObject* attributes(PyObject* object) {
  PyObject* dict = object ? PyObject_GenericGetDict(object, nullptr) : nullptr;
  if (!dict) {
    PyErr_Clear();
    return nullptr;
  }
  Py_DECREF(dict);  // the object has it too
  return dict;
}

bool is_empty_dict(PyObject* object) { return object && PyDict_Check(object) && PyDict_GET_SIZE(object) == 0; }

bool is_number(PyObject* object) { return object && (PyFloat_CheckExact(object) || PyLong_CheckExact(object)); }

double as_number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw python_error();
  return value;
}

const Tensor* plain_tensor(PyObject* object) {
  return object && THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

/// Whether torch has to see the single calls: global module hooks, and transforms that the ops have no rule for
/// (torch.func's, forward-mode differentiation).
bool calls_are_observed() {
  for (PyObject* hooks : known().global_hooks)
    if (!is_empty_dict(hooks)) return true;
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

/// A module's own attributes, if calling it does no more than its class's forward; else null.
PyObject* unhooked(PyObject* module) {
  const Known& k = known();
  PyObject* own = attributes(module);
  if (!own || item(own, k.forward)) return nullptr;
  for (PyObject* key : {k.forward_hooks, k.forward_pre_hooks, k.backward_hooks, k.backward_pre_hooks}) {
    if (!is_empty_dict(item(own, key))) return nullptr;
  }
  return own;
}

/// transformers' Conv1D, which keeps its weight transposed.
bool is_conv1d(PyObject* module) {
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
  // Adapters with a variant, and of the first adapter its name and the variant, borrowed from the layer.
  int variants = 0;
  PyObject *first_name = nullptr, *first_variant = nullptr;

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
      if (!tensor) return false;
      out->bias = *tensor;
    }
    dtype_ = weight->scalar_type();
    out->stored_weight = *weight;
    return true;
  }

  /// names: a name, or a list or tuple of names, of which those that are not here are passed over.
  bool read_adapters(PyObject* names, Operands* out) {
    a_modules_ = item(attributes(item(modules_, k_.lora_a)), k_.modules);
    b_modules_ = item(attributes(item(modules_, k_.lora_b)), k_.modules);
    dropouts_ = item(attributes(item(modules_, k_.lora_dropout)), k_.modules);
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
  /// Whether the op can take x beside this weight; autocast brings the two to one dtype, but leaves f64 alone.
  bool fits(const Tensor& weight) const {
    if (!x_.is_cpu() || x_.is_nested() || x_.dim() == 0) return false;
    PyObject* in_features = item(own_, k_.in_features);
    if (!in_features || !PyLong_CheckExact(in_features) || PyLong_AsLongLong(in_features) != x_.size(-1)) return false;
    const at::ScalarType x_dtype = x_.scalar_type(), dtype = weight.scalar_type();
    return x_dtype == dtype ||
           (at::autocast::is_autocast_enabled(at::kCPU) && x_dtype != at::kDouble && dtype != at::kDouble);
  }

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
    if (!a || !b || a->scalar_type() != b->scalar_type()) return false;
    if (a->scalar_type() != dtype_ && (a->scalar_type() != at::kFloat || !casts_input())) return false;
    double scaling, p;
    if (!read_scaling(item(scalings_, name), &scaling) || !read_dropout(item(dropouts_, name), &p)) return false;
    PyObject* variant = PyDict_GET_SIZE(variants_) > 0 ? item(variants_, name) : nullptr;
    if (out->a.empty()) {
      out->first_name = name;
      out->first_variant = variant;
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

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

/// As pylora.ops.draw_rng: the same bits from the same generator.
OptionalTensor rng_for(double dropout_p, const Tensor& x) {
  if (dropout_p <= 0) return std::nullopt;
  constexpr int64_t kLow = std::numeric_limits<int64_t>::min(), kHigh = std::numeric_limits<int64_t>::max();
  return at::randint(kLow, kHigh, {2}, x.options().dtype(at::kLong));
}

Tensor run(const Operands& in, const Tensor& x) {
  const WithoutGil no_gil;
  const auto scaling = [&](size_t i) { return in.scalings[i]; };
  const auto p = [&](size_t i) { return in.dropout_ps[i]; };
  Tensor y = lora::call_linear(x, in.weight(), in.bias, in.a[0], in.b[0], scaling(0), p(0), rng_for(p(0), x));
  for (size_t i = 1; i < in.a.size(); ++i)
    y = lora::call_add(y, x, in.a[i], in.b[i], scaling(i), p(i), rng_for(p(i), x));
  return y;
}

/// LoraVariant.fused_forward(layer, name, x, weight, bias, a, b, scaling, dropout_p).
PyObject* run_variant(const Operands& in, PyObject* layer, PyObject* x) {
  const Owned variant(Py_NewRef(in.first_variant)), name(Py_NewRef(in.first_name));
  const Owned weight(THPVariable_Wrap(in.weight())), a(THPVariable_Wrap(in.a[0])), b(THPVariable_Wrap(in.b[0]));
  const Owned bias(in.bias ? THPVariable_Wrap(*in.bias) : Py_NewRef(Py_None));
  const Owned scaling(PyFloat_FromDouble(in.scalings[0])), p(PyFloat_FromDouble(in.dropout_ps[0]));
  return Owned(PyObject_CallMethodObjArgs(variant.get(), known().fused_forward, layer, name.get(), x, weight.get(),
                                          bias.get(), a.get(), b.get(), scaling.get(), p.get(), nullptr))
      .release();
}

PyObject* none() { return Py_NewRef(Py_None); }

PyObject* dense_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "dense_forward: expected 2 arguments, got ", count);
  const Tensor* x = plain_tensor(args[1]);
  if (!x || calls_are_observed()) return none();
  Reader reader(args[0], *x);
  Operands in;
  if (!reader.adds_adapters() || !reader.read_base(&in) || !reader.read_adapters(reader.active_adapters(), &in))
    return none();
  if (in.variants == 0) return THPVariable_Wrap(run(in, *x));
  // A variant's op has its place in the order of adapters only if there is no other.
  return in.a.size() == 1 ? run_variant(in, args[0], args[1]) : none();
  END_HANDLE_TH_ERRORS
}

PyObject* dense_mixed_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "dense_mixed_forward: expected 6 arguments, got ", count);
  const Tensor* x = plain_tensor(args[1]);
  const Tensor *order = plain_tensor(args[3]), *indptr = plain_tensor(args[4]), *slots = plain_tensor(args[5]);
  if (!x || !order || !indptr || !slots || calls_are_observed()) return none();
  Reader reader(args[0], *x);
  Operands in;
  if (!reader.read_base(&in) || !reader.read_adapters(args[2], &in) || in.variants > 0) return none();
  TORCH_CHECK_VALUE(static_cast<Py_ssize_t>(in.a.size()) == PyObject_Size(args[2]),
                    "dense_mixed_forward: names: expected adapters of this layer");
  double most_dropped = 0;
  for (double p : in.dropout_ps)
    most_dropped = p > most_dropped ? p : most_dropped;
  if (most_dropped == 0) in.dropout_ps.clear();
  const auto run = [&] {
    const WithoutGil no_gil;
    return multi_lora::call_linear(*x, in.weight(), in.bias, in.a, in.b, in.scalings, in.dropout_ps,
                                   rng_for(most_dropped, *x), *order, *indptr, *slots);
  };
  return THPVariable_Wrap(run());
  END_HANDLE_TH_ERRORS
}

PyCFunction as_function(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

PyMethodDef* dense_layer_functions() {
  known();  // now, with no other thread about
  static PyMethodDef functions[] = {
      {"dense_forward", as_function(dense_forward), METH_FASTCALL,
       "dense_forward(layer, x): a pylora.layers.Linear's forward by an op, or None where modules have to be called."},
      {"dense_mixed_forward", as_function(dense_mixed_forward), METH_FASTCALL,
       "dense_mixed_forward(layer, x, names, order, indptr, slots): the same for a mixed batch; slot i is names[i]."},
      {nullptr, nullptr, 0, nullptr}};
  return functions;
}

}  // namespace pylora::binding
