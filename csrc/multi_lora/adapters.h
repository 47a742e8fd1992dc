// What the ops of the family check and hand to the kernels: a batch's plan and its adapters. Included by op.cpp and the
// headers that it alone includes.
#pragma once

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#include "binding/segments.h"
#include "binding/tensors.h"
#include "multi_lora/multi_lora.h"

namespace pylora::multi_lora {

inline SegmentPlan check_plan(const char* op, const char* name, const Tensor& like, int64_t num_tokens,
                              int64_t num_adapters, const Tensor& order, const Tensor& indptr, const Tensor& slots) {
  binding::check_indices(op, "order", order, -1, like);
  binding::check_indices(op, "slots", slots, -1, like);
  const int64_t num_rows = order.size(0);
  binding::check_indptr(op, "indptr", indptr, slots.size(0), num_rows, like);
  binding::Checks(op).same_device("slots", slots, "order", order);
  binding::Checks(op).same_device("indptr", indptr, "order", order);
  binding::check_slots(op, "slots", slots, num_adapters);
  TORCH_CHECK_VALUE(num_rows == 0 ? num_tokens == 0 : like.dim() >= 2 && like.size(0) == num_rows, op, ": ", name,
                    ": expected ", num_rows, " rows, as the plan has, got shape ", like.sizes());
  const Tensor checked = binding::values_to_check(order);
  const int32_t* row = checked.defined() ? checked.const_data_ptr<int32_t>() : nullptr;
  std::vector<bool> seen(static_cast<size_t>(num_rows));
  for (int64_t i = 0; row && i < num_rows; ++i) {
    const bool fits = row[i] >= 0 && row[i] < num_rows && !seen[static_cast<size_t>(row[i])];
    TORCH_CHECK_VALUE(fits, op, ": order: expected each row from 0 to ", num_rows - 1, " once, got ", row[i], " at ",
                      i);
    seen[static_cast<size_t>(row[i])] = true;
  }
  SegmentPlan plan;
  plan.num_segments = slots.size(0);
  plan.tokens_per_row = num_rows > 0 ? num_tokens / num_rows : 1;
  plan.order = order.const_data_ptr<int32_t>();
  plan.indptr = indptr.const_data_ptr<int32_t>();
  plan.slots = slots.const_data_ptr<int32_t>();
  plan.on_device = !order.is_cpu();
  return plan;
}

inline std::vector<SegmentSlot> check_adapters(const char* op, const char* name, const Tensor& like,
                                               int64_t in_features, int64_t out_features, TensorList a, TensorList b,
                                               Doubles scalings, Doubles dropout, const OptionalTensor& rng,
                                               int64_t groups = 1) {
  const binding::Checks check(op);
  check.kernel_dtype(name, like);
  TORCH_CHECK_VALUE(b.size() == a.size() && scalings.size() == a.size(), op, ": b: expected as many as a, ", a.size(),
                    ", got ", b.size(), " and ", scalings.size(), " scalings");
  TORCH_CHECK_VALUE(dropout.empty() || dropout.size() == a.size(), op, ": dropout: expected none or ", a.size(),
                    ", got ", dropout.size());
  std::vector<SegmentSlot> slots(a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    check.kernel_dtype("a", a[i]);
    check.shape("a", a[i], {-1, in_features});
    check.shape("b", b[i], {out_features, a[i].size(0) / groups});
    check.same_dtype("b", b[i], "a", a[i]);
    check.same_device("a", a[i], name, like);
    check.same_device("b", b[i], name, like);
    const double p = dropout.empty() ? 0.0 : dropout[i];
    check.dropout(p, rng, like);
    SegmentSlot& slot = slots[i];
    slot.a = binding::matrix(a[i]);
    slot.b = binding::matrix(b[i]);
    slot.rank = a[i].size(0);
    slot.scaling = scalings[i];
    slot.dtype = binding::to_dtype(a[i].scalar_type());
    if (p > 0) slot.dropout = make_dropout(p, rng->const_data_ptr<int64_t>());
  }
  return slots;
}

inline int64_t largest_rank(const std::vector<SegmentSlot>& slots) {
  int64_t rank = 0;
  for (const SegmentSlot& slot : slots)
    rank = std::max(rank, slot.rank);
  return rank;
}

/// Gradients of these factors, where there are any, in the factors' dtypes.
inline void to_dtypes_of(TensorList factors, std::vector<Tensor>* grads) {
  for (size_t i = 0; i < grads->size(); ++i)
    (*grads)[i] = (*grads)[i].to(factors[i].scalar_type());
}

/// Sums for the gradients of all factors, in accumulators, as a launcher takes them.
struct FactorSums {
  std::vector<Tensor> da, db;  // each [rank, in]; [rank, out]
  std::vector<void*> da_pointers, db_pointers;

  /// `sums`: the accumulators' options.
  FactorSums(TensorList a, TensorList b, const at::TensorOptions& sums) {
    for (size_t i = 0; i < a.size(); ++i) {
      da.push_back(at::zeros(a[i].sizes(), sums));
      db.push_back(at::zeros({b[i].size(1), b[i].size(0)}, sums));
      da_pointers.push_back(da.back().mutable_data_ptr());
      db_pointers.push_back(db.back().mutable_data_ptr());
    }
  }

  /// In the factors' dtypes and layouts.
  FactorGradients as_gradients(TensorList a, TensorList b) const {
    FactorGradients result;
    for (size_t i = 0; i < da.size(); ++i) {
      std::get<0>(result).push_back(da[i]);
      std::get<1>(result).push_back(db[i].t().contiguous());
    }
    to_dtypes_of(a, &std::get<0>(result));
    to_dtypes_of(b, &std::get<1>(result));
    return result;
  }
};

inline std::vector<Tensor> factors_of(TensorList a, TensorList b) {
  std::vector<Tensor> factors(a.begin(), a.end());
  factors.insert(factors.end(), b.begin(), b.end());
  return factors;
}

inline void check_in_place(const char* op, const Tensor& y) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !y.requires_grad() || !y.is_leaf(), op,
              ": y: expected a tensor that is no leaf that requires grad, which cannot be changed in place");
}

}  // namespace pylora::multi_lora
