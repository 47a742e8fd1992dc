// pylora::merge_, unmerge_, swap_ and merge_is_finite: schemas and registration; cpu_call.h and cuda_call.h have the calls.
#include <torch/library.h>

#include "merge/cpu_call.h"
#if defined(PYLORA_WITH_CUDA)
#include "merge/cuda_call.h"
#endif

namespace pylora::merge {
namespace {

template <class Call>
Tensor merge(Tensor& w, at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings, const RowScales& row_scales,
             bool log) {
  Call call("merge_", w);
  call.put_in(a, b, scalings, row_scales);
  if (log) return call.run_with_log();
  call.run();
  return new_bytes(0, w.device());
}

template <class Call>
void unmerge(Tensor& w, at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings, const RowScales& row_scales,
             const OptionalTensor& log) {
  Call call("unmerge_", w);
  call.take_out("", a, b, scalings, row_scales);
  call.read_log("log", log);
  call.run();
}

template <class Call>
Tensor swap(Tensor& w, at::TensorList old_a, at::TensorList old_b, at::ArrayRef<double> old_scalings,
            const RowScales& old_row_scales, const OptionalTensor& old_log, at::TensorList a, at::TensorList b,
            at::ArrayRef<double> scalings, const RowScales& row_scales, bool log) {
  Call call("swap_", w);
  call.take_out("old_", old_a, old_b, old_scalings, old_row_scales);
  call.put_in(a, b, scalings, row_scales);
  call.read_log("old_log", old_log);
  call.check_unchanged();
  if (log) return call.run_with_log();
  call.run();
  return new_bytes(0, w.device());
}

template <class Call>
bool is_finite(const Tensor& w, at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings,
               const RowScales& row_scales) {
  Call call("merge_is_finite", w);
  call.put_in(a, b, scalings, row_scales);
  return call.is_finite();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("merge_(Tensor(a!) w, Tensor[] a, Tensor[] b, float[] scalings, Tensor?[] row_scales, bool log=True) -> Tensor",
        tags);
  m.def("unmerge_(Tensor(a!) w, Tensor[] a, Tensor[] b, float[] scalings, Tensor?[] row_scales, Tensor? log) -> ()",
        tags);
  m.def(
      "swap_(Tensor(a!) w, Tensor[] old_a, Tensor[] old_b, float[] old_scalings, Tensor?[] old_row_scales, Tensor? "
      "old_log, Tensor[] a, Tensor[] b, float[] scalings, Tensor?[] row_scales, bool log=True) -> Tensor",
      tags);
  m.def("merge_is_finite(Tensor w, Tensor[] a, Tensor[] b, float[] scalings, Tensor?[] row_scales) -> bool", tags);
}

template <class Call>
void implement(torch::Library& m) {
  m.impl("merge_", &merge<Call>);
  m.impl("unmerge_", &unmerge<Call>);
  m.impl("swap_", &swap<Call>);
  m.impl("merge_is_finite", &is_finite<Call>);
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) { implement<CpuCall>(m); }

#if defined(PYLORA_WITH_CUDA)
TORCH_LIBRARY_IMPL(pylora, CUDA, m) { implement<CudaCall>(m); }
#endif

}  // namespace pylora::merge
