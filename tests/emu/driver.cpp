#include "emu/driver/binder.h"
#include "emu_kernels.h"

namespace pylora::emu_tests {
namespace {

namespace py = pybind11;
using emu::def_launcher;
using emu::Fields;

void define_bugs(py::module_& module) {
  Fields<BugArgs> fields;
  fields.field("bug", &BugArgs::bug)
      .field("offset", &BugArgs::offset)
      .field("blocks", &BugArgs::blocks)
      .field("x", &BugArgs::x)
      .field("y", &BugArgs::y)
      .field("counter", &BugArgs::counter);
  def_launcher(module, "stage", fields, &stage);
  def_launcher(module, "warp_exchange", fields, &warp_exchange);
  def_launcher(module, "barriers", fields, &barriers);
  def_launcher(module, "lanes", fields, &lanes);
  def_launcher(module, "bounds", fields, &bounds);
  def_launcher(module, "shared", fields, &shared);
  def_launcher(module, "last_block", fields, &last_block);
  def_launcher(module, "fragments", fields, &fragments);
}

void define_tensor_core(py::module_& module) {
  Fields<MmaArgs> mma_fields;
  mma_fields.field("kind", &MmaArgs::kind).field("a", &MmaArgs::a).field("b", &MmaArgs::b).field("d", &MmaArgs::d);
  def_launcher(module, "mma", mma_fields, &mma);
  Fields<MatrixArgs> matrices;
  matrices.field("count", &MatrixArgs::count)
      .field("transposed", &MatrixArgs::transposed)
      .field("rows", &MatrixArgs::rows)
      .field("registers", &MatrixArgs::registers);
  def_launcher(module, "ldmatrix", matrices, &ldmatrix);
}

void define(py::module_& module) {
  define_bugs(module);
  define_tensor_core(module);
  Fields<CollectiveArgs> collective;
  collective.field("mask", &CollectiveArgs::mask)
      .field("operand", &CollectiveArgs::operand)
      .field("width", &CollectiveArgs::width)
      .field("out", &CollectiveArgs::out);
  def_launcher(module, "collectives", collective, &collectives);
  Fields<AtomicArgs> atomic;
  atomic.field("blocks", &AtomicArgs::blocks)
      .field("threads", &AtomicArgs::threads)
      .field("f32", &AtomicArgs::f32)
      .field("i32", &AtomicArgs::i32)
      .field("pairs_bf16", &AtomicArgs::pairs_bf16)
      .field("pairs_f16", &AtomicArgs::pairs_f16)
      .field("cas", &AtomicArgs::cas);
  def_launcher(module, "atomics", atomic, &atomics);
  Fields<IndexArgs> indices;
  indices.field("out", &IndexArgs::out);
  def_launcher(module, "index", indices, &index);
  Fields<CountArgs> counts;
  counts.field("bytes", &CountArgs::bytes)
      .field("stride", &CountArgs::stride)
      .field("uniform_loads", &CountArgs::uniform_loads)
      .field("copied_bytes", &CountArgs::copied_bytes)
      .field("x", &CountArgs::x)
      .field("y", &CountArgs::y);
  def_launcher(module, "count", counts, &count);
  Fields<PipeArgs> pipes;
  pipes.field("x", &PipeArgs::x).field("y", &PipeArgs::y);
  def_launcher(module, "pipe", pipes, &pipe);
  Fields<ConvertArgs> conversions;
  conversions.field("count", &ConvertArgs::count)
      .field("dtype", &ConvertArgs::dtype)
      .field("x", &ConvertArgs::x)
      .field("narrowed", &ConvertArgs::narrowed)
      .field("widened", &ConvertArgs::widened)
      .field("paired", &ConvertArgs::paired);
  def_launcher(module, "convert", conversions, &convert);
}

const emu::Registration registration("emu_tests", &define);

}  // namespace
}  // namespace pylora::emu_tests
