// The merge ops' arguments, checked, as launchers on any device take them.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <string>
#include <vector>

#include "binding/checks.h"
#include "merge/call.h"
#include "merge/heuristics.h"

namespace pylora::merge {

inline Tensor new_bytes(int64_t bytes, at::Device device = at::kCPU) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

/// Whether no two elements share memory, of which threads would write each its own: rows within a matrix, and the
/// matrices of a stack, one after another or each in the gaps between the others' rows.
inline bool lie_apart(const Weight& w) {
  if (w.count == 0 || matrix_elements(w) == 0) return true;
  if (w.rows > 1 && w.row_stride < w.columns) return false;
  if (w.count == 1) return true;
  const bool in_gaps = w.matrix_stride >= w.columns && w.row_stride >= (w.count - 1) * w.matrix_stride + w.columns;
  return w.matrix_stride >= (w.rows - 1) * w.row_stride + w.columns || in_gaps;
}

/// W and the adapters of both changes; owns what they point to.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& w, c10::DeviceType device) : op_(op), check_(op), w_(w) {
    check_.kernel_dtype("w", w);
    TORCH_CHECK_VALUE(w.dim() == 2 || w.dim() == 3, op_, ": w: expected 2 or 3 dimensions, got shape ", w.sizes());
    TORCH_CHECK_VALUE(w.device().type() == device, op_, ": w: expected a tensor on ",
                      device == at::kCPU ? "the CPU" : "a GPU, where another argument is", ", got one on ", w.device());
    const int64_t out = w.size(-2), in = w.size(-1);
    const bool as_rows = in <= 1 || w.stride(-1) == 1, as_columns = out <= 1 || w.stride(-2) == 1;
    weight_.transposed = !as_rows && as_columns;
    weight_.count = w.dim() == 3 ? w.size(0) : 1;
    weight_.rows = weight_.transposed ? in : out;
    weight_.columns = weight_.transposed ? out : in;
    weight_.dtype = binding::to_dtype(w.scalar_type());
    const int64_t stride = w.stride(weight_.transposed ? -1 : -2);
    weight_.row_stride = weight_.rows > 1 ? stride : weight_.columns;
    weight_.matrix_stride = w.dim() == 3 ? w.stride(0) : 0;
    TORCH_CHECK_VALUE((as_rows || as_columns) && lie_apart(weight_), op_,
                      ": w: expected elements that do not overlap, with a stride of 1 in one of the last two "
                      "dimensions, got shape ",
                      w.sizes(), " and strides ", w.strides());
  }

  void take_out(const char* prefix, at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings,
                const RowScales& row_scales) {
    take_out_ = adapters(&out_, prefix, a, b, scalings, row_scales);
  }
  void put_in(at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings, const RowScales& row_scales) {
    put_in_ = adapters(&in_, "", a, b, scalings, row_scales);
  }

 protected:
  void throw_unless(bool unchanged) const {
    TORCH_CHECK_VALUE(unchanged, op_,
                      ": w: expected the values that the merge left, got others: the weight was "
                      "changed after the merge");
  }

  Weight with_data(Weight weight) const {
    weight.data = w_.mutable_data_ptr();
    return weight;
  }

  void bump_version() const {
    if (!w_.is_inference()) w_.unsafeGetTensorImpl()->bump_version();
  }

  const char* op_;
  binding::Checks check_;
  const Tensor& w_;
  Weight weight_;
  Change take_out_, put_in_;

 private:
  Change adapters(std::vector<Adapter>* list, const std::string& prefix, at::TensorList a, at::TensorList b,
                  at::ArrayRef<double> scalings, const RowScales& row_scales) {
    TORCH_CHECK_VALUE(!a.empty(), op_, ": ", prefix, "a: expected at least one adapter, got none");
    TORCH_CHECK_VALUE(b.size() == a.size() && scalings.size() == a.size(), op_, ": ", prefix, "b, ", prefix,
                      "scalings: expected as many as ", prefix, "a, ", a.size(), ", got ", b.size(), " and ",
                      scalings.size());
    TORCH_CHECK_VALUE(row_scales.empty() || row_scales.size() == a.size(), op_, ": ", prefix,
                      "row_scales: expected as many as ", prefix, "a, ", a.size(), ", or none, got ",
                      row_scales.size());
    for (size_t i = 0; i < a.size(); ++i) {
      const OptionalTensor scale = row_scales.empty() ? OptionalTensor() : OptionalTensor(row_scales.get(i));
      list->push_back(adapter(prefix, a[i], b[i], scalings[i], scale));
    }
    return {list->data(), static_cast<int64_t>(list->size())};
  }

  Adapter adapter(const std::string& prefix, const Tensor& a, const Tensor& b, double scaling,
                  const OptionalTensor& row_scale) {
    const std::string a_name = prefix + "a", b_name = prefix + "b", scale_name = prefix + "row_scales";
    const int64_t out = w_.size(-2), in = w_.size(-1);
    check_.kernel_dtype(a_name.c_str(), a);
    if (w_.dim() == 3) {
      check_.shape(a_name.c_str(), a, {w_.size(0), -1, in});
      check_.shape(b_name.c_str(), b, {w_.size(0), out, a.size(1)});
    } else {
      check_.shape(a_name.c_str(), a, {-1, in});
      check_.shape(b_name.c_str(), b, {out, a.size(0)});
    }
    TORCH_CHECK_VALUE(a.size(-2) >= 1, op_, ": ", a_name, ": expected a rank of at least 1, got shape ", a.sizes());
    check_.same_dtype(b_name.c_str(), b, a_name.c_str(), a);
    check_.same_device(a_name.c_str(), a, "w", w_);
    check_.same_device(b_name.c_str(), b, "w", w_);
    Adapter result;
    result.rank = a.size(-2);
    result.dtype = binding::to_dtype(a.scalar_type());
    result.a = {a.const_data_ptr(), a.stride(-2), a.stride(-1)};
    result.b = {b.const_data_ptr(), b.stride(-2), b.stride(-1)};
    result.a_stride = a.dim() == 3 ? a.stride(0) : 0;
    result.b_stride = b.dim() == 3 ? b.stride(0) : 0;
    result.scaling = scaling;
    if (row_scale) {
      check_.kernel_dtype(scale_name.c_str(), *row_scale);
      check_.shape(scale_name.c_str(), *row_scale, {out});
      check_.same_device(scale_name.c_str(), *row_scale, "w", w_);
      scales_.push_back(row_scale->to(binding::accumulator_type(w_.scalar_type())).contiguous());
      result.row_scale = scales_.back().const_data_ptr();
    }
    return result;
  }

  std::vector<Adapter> out_, in_;
  std::vector<Tensor> scales_;
};

}  // namespace pylora::merge
