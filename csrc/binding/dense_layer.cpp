// Python's functions for a dense layer's forward: the layer is read (binding/layer_reader.h) and an op called.
#include "binding/dense_layer.h"

#include <ATen/ops/randint.h>
#include <pybind11/pybind11.h>

#include <limits>

#include "binding/layer_reader.h"
#include "dora/call.h"
#include "dora/kept_norms.h"
#include "lora/call.h"
#include "multi_lora/multi_lora.h"

namespace pylora::binding {
namespace {

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

/// Classes that run_dora serves, and pylora.layers.variants.dora_cache.writes_and_trust; owned, as they are kept.
struct Dora {
  PyTypeObject *variant, *magnitudes;
  PyObject* writes_and_trust;
};
std::vector<Dora> registered_doras;  // pylora's, and PEFT's where it is patched

const Dora* dora_for(PyTypeObject* variant) {
  for (const Dora& each : registered_doras)
    if (each.variant == variant) return &each;
  return nullptr;
}

/// A DoRA adapter's forward with the norms that are kept, or nothing where none are, or a module has to be called.
std::optional<Tensor> run_dora(const Operands& in, const Tensor& x) {
  const Known& k = known();
  const Dora* const served = dora_for(Py_TYPE(in.first_variant));
  if (!served || !in.first_magnitudes || Py_TYPE(in.first_magnitudes) != served->magnitudes) return std::nullopt;
  PyObject* own = unhooked(in.first_magnitudes);
  const Tensor* found = plain_tensor(item(item(own, k.parameters), k.weight));
  PyObject* kept_norms = item(own, k.kept_norms);
  if (!found || !kept_norms || kept_norms == Py_None) return std::nullopt;
  const Tensor magnitude = *found, weight = in.weight();
  const Owned owner(Py_NewRef(kept_norms)), now(PyObject_CallNoArgs(served->writes_and_trust));
  int64_t writes, trust;
  if (!PyArg_ParseTuple(now.get(), "LL", &writes, &trust)) throw python_error();
  const auto* kept = pybind11::handle(owner.get()).cast<const dora::KeptNorms*>();
  const OptionalTensor norms = kept->find(weight, in.a[0], in.b[0], in.scalings[0], writes, trust);
  if (!norms) return std::nullopt;
  const WithoutGil no_gil;
  return dora::call_linear(x, weight, in.bias, in.a[0], in.b[0], magnitude, *norms, in.scalings[0], in.dropout_ps[0],
                           rng_for(in.dropout_ps[0], x));
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
  if (in.a.size() > 1) return none();
  if (std::optional<Tensor> y = run_dora(in, *x)) return THPVariable_Wrap(*std::move(y));
  return run_variant(in, args[0], args[1]);
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

PyObject* register_dora(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && PyType_Check(args[0]) && PyType_Check(args[1]) && PyCallable_Check(args[2]),
                   "register_dora: expected two classes and a function");
  if (dora_for(reinterpret_cast<PyTypeObject*>(args[0]))) return none();
  for (Py_ssize_t i = 0; i < count; ++i)
    Py_INCREF(args[i]);
  registered_doras.push_back(
      {reinterpret_cast<PyTypeObject*>(args[0]), reinterpret_cast<PyTypeObject*>(args[1]), args[2]});
  return none();
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
      {"register_dora", as_function(register_dora), METH_FASTCALL,
       "register_dora(variant_class, magnitudes_class, writes_and_trust): whose forwards dense_forward makes itself "
       "while their norms are kept."},
      {nullptr, nullptr, 0, nullptr}};
  return functions;
}

}  // namespace pylora::binding
