// The pool ops' products on CUDA (csrc/cuda/segments.h). Plan, ranks and scalings may be in the device's memory: then
// nothing is read from it, and a captured graph follows what is there at each replay. What is in the host's memory goes to
// the device as a launch's arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/segments.h"

namespace pylora::binding {

struct Pools;
struct PoolGradients;

void pools_shrink_cuda(const Pools& pools, const SegmentPlan& plan, const at::Tensor& x, const at::Tensor& v);
void pools_expand_cuda(const Pools& pools, const SegmentPlan& plan, const at::Tensor& v, const at::Tensor& y);
/// Both; in one launch where that is better: few rows, 16-bit tensors.
void pools_forward_cuda(const Pools& pools, const SegmentPlan& plan, const at::Tensor& x, const at::Tensor& v,
                        const at::Tensor& y);
PoolGradients pools_backward_cuda(const Pools& pools, const SegmentPlan& plan, const at::Tensor& dy,
                                  const at::Tensor& x, const at::Tensor& v, bool need_x,
                                  const std::vector<bool>& need_a, const std::vector<bool>& need_b);

}  // namespace pylora::binding
