// Low-rank convolutions of many adapters in one call, on the CPU: what segments.h does for dense layers. A row of the
// batch is an image of one, two or three spatial dimensions, stored channel by channel.
//
// For each row n of a segment with slot s >= 0 (a slot of -1: the row is not touched):
//   v[n]  = a_s * x[n]                       a convolution that slides as the base layer's, rank_s channels
//   y[n] += scaling_s * b_s v[n]             of kernel size 1, in `groups` groups
//
// Numerics. Products are summed in f32 (f64 for f64 activations) along the channels of x and the kernel's elements in
// order, then along the rank. y is read, added to and rounded once (once for each 512 ranks beyond 512). A row of y
// depends on that row of x and its slot alone, and has the same bits in any batch and for any number of threads.
#pragma once

#include "cpu/segments.h"

namespace pylora {

constexpr int kSpatialDims = 3;

/// How a kernel slides. Missing dimensions come first, with sizes and steps of 1 and no padding.
struct ConvGeometry {
  int64_t in[kSpatialDims] = {1, 1, 1};
  int64_t out[kSpatialDims] = {1, 1, 1};
  int64_t kernel[kSpatialDims] = {1, 1, 1};
  int64_t stride[kSpatialDims] = {1, 1, 1};
  int64_t padding[kSpatialDims] = {0, 0, 0};  // of zeros, before the first element
  int64_t dilation[kSpatialDims] = {1, 1, 1};

  static int64_t product(const int64_t (&sizes)[kSpatialDims]) { return sizes[0] * sizes[1] * sizes[2]; }
  int64_t plane() const { return product(in); }
  int64_t positions() const { return product(out); }
  int64_t taps() const { return product(kernel); }
};

struct SegmentConv {
  ConvGeometry geometry;
  int64_t in_channels = 0;
  int64_t out_channels = 0;
  int64_t groups = 1;                  // of b: output channels of group j read the j-th share of the ranks
  int64_t v_stride = 0;                // of a row of v in channels, at least the largest rank
  DType dtype = DType::f32;            // of x and y
  SegmentPlan plan;                    // tokens_per_row is 1
  const SegmentSlot* slots = nullptr;  // a [rank, in_channels * taps], b [out_channels, rank / groups]; no dropout
  int64_t num_slots = 0;
  const void* x = nullptr;    // [rows, in_channels, plane], contiguous
  void* y = nullptr;          // [rows, out_channels, positions], contiguous
  void* v = nullptr;          // [rows, v_stride, positions], accumulators; a row's first rank_s channels are written
  void* workspace = nullptr;  // segments_conv_workspace_bytes(args)
};

int64_t segments_conv_workspace_bytes(const SegmentConv& args);
Status segments_conv_cpu(const Context& context, const SegmentConv& args);

}  // namespace pylora
