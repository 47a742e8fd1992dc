// The launcher of segments_conv.h: packs the factors, then shares out rows and blocks of positions.
#include "cpu/segments_conv.h"

#include "common/sizes.h"
#include "cpu/kernel_table.h"
#include "cpu/segments_conv_kernels.h"

PYLORA_KERNEL_TABLE(SegmentConvKernels, segment_conv_kernels)

namespace pylora {
namespace {

int64_t elements_of_a(const SegmentConv& args, const SegmentSlot& slot) {
  return slot.rank * args.in_channels * args.geometry.taps();
}

int64_t elements_of_b(const SegmentConv& args, const SegmentSlot& slot) {
  return slot.rank / args.groups * args.out_channels;
}

int64_t accumulator_bytes(const SegmentConv& args) { return dtype_bytes(accumulator_dtype(args.dtype)); }

int64_t bytes_of_a(const SegmentConv& args, int64_t i) {
  return align_up(elements_of_a(args, args.slots[i]) * accumulator_bytes(args));
}

int64_t bytes_of_b(const SegmentConv& args, int64_t i) {
  return align_up(elements_of_b(args, args.slots[i]) * accumulator_bytes(args));
}

/// Where slot i's factors lie in the workspace: A first, B behind it.
int64_t packed_offset(const SegmentConv& args, int64_t i) {
  int64_t offset = 0;
  for (int64_t s = 0; s < i; ++s)
    offset += bytes_of_a(args, s) + bytes_of_b(args, s);
  return offset;
}

PackedFactors packed_factors(const SegmentConv& args, int64_t i) {
  const char* p = static_cast<const char*>(args.workspace) + packed_offset(args, i);
  return {p, p + bytes_of_a(args, i)};
}

bool is_used(const SegmentPlan& plan, int64_t slot) {
  for (int64_t s = 0; s < plan.num_segments; ++s)
    if (plan.slots[s] == slot && plan.indptr[s + 1] > plan.indptr[s]) return true;
  return false;
}

int64_t segment_of_position(const SegmentPlan& plan, int64_t p) {
  int64_t s = 0;
  while (plan.begin_of(s + 1) <= p)
    ++s;
  return s;
}

/// A kernel of one element slides over a plane as over a line.
ConvGeometry flattened(ConvGeometry g) {
  const bool is_pointwise = g.taps() == 1 && ConvGeometry::product(g.stride) == 1 && g.plane() == g.positions();
  if (!is_pointwise) return g;
  ConvGeometry line;
  line.in[2] = line.out[2] = g.positions();
  return line;
}

}  // namespace

int64_t segments_conv_workspace_bytes(const SegmentConv& args) { return packed_offset(args, args.num_slots); }

Status segments_conv_cpu(const Context& context, const SegmentConv& given) {
  if (given.plan.tokens_per_row != 1) return invalid_argument("conv: plan: expected rows of the batch");
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  const SegmentConvKernels& kernels = segment_conv_kernels_table(isa);
  SegmentConv args = given;
  args.geometry = flattened(given.geometry);
  const SegmentPlan& plan = args.plan;
  const int dtype = static_cast<int>(args.dtype);
  const int64_t depth = args.in_channels * args.geometry.taps();
  parallel_for(context, args.num_slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const SegmentSlot& slot = args.slots[i];
      if (slot.rank == 0 || !is_used(plan, i)) continue;
      const PackedFactors packed = packed_factors(args, i);
      kernels.pack[dtype](slot.a, slot.dtype, slot.rank, depth, const_cast<void*>(packed.a));
      kernels.pack[dtype](slot.b, slot.dtype, args.out_channels, slot.rank / args.groups, const_cast<void*>(packed.b));
    }
  });
  const int64_t positions = args.geometry.positions();
  const int64_t blocks = (positions + kConvPositions - 1) / kConvPositions;
  const int64_t work = kConvPositions * args.v_stride * (depth + args.out_channels);
  parallel_for(context, plan.num_positions() * blocks, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int32_t slot = plan.slots[segment_of_position(plan, item / blocks)];
      if (slot < 0 || args.slots[slot].rank == 0) continue;
      const int64_t row = plan.token(item / blocks), first = item % blocks * kConvPositions;
      const int64_t last = first + kConvPositions < positions ? first + kConvPositions : positions;
      const PackedFactors packed = packed_factors(args, slot);
      kernels.shrink[dtype](args, row, args.slots[slot].rank, packed.a, first, last);
      kernels.expand[dtype](args, row, args.slots[slot], packed.b, first, last);
    }
  });
  return {};
}

}  // namespace pylora
