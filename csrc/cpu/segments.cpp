// The launchers of segments.h: share out tokens (shrink, expand) or columns (sums over tokens).
#include "cpu/segments.h"

#include "common/sizes.h"
#include "cpu/kernel_table.h"
#include "cpu/segments_kernels.h"

PYLORA_KERNEL_TABLE(SegmentKernels, segment_kernels)
PYLORA_KERNEL_TABLE(SegmentLookupKernels, segment_lookup_kernels)

namespace pylora {
namespace {

constexpr int64_t kFewTokens = 4;  // a segment of no more waits for its factors rather than for arithmetic

int index(DType dtype) { return static_cast<int>(dtype); }

ConstMatrix transposed(ConstMatrix m) { return {m.data, m.column_stride, m.row_stride}; }

struct Kernels {
  const SegmentKernels* dense;
  const SegmentLookupKernels* lookup;
};

Status find_kernels(Kernels* kernels) {
  Isa isa;
  const Status status = current_isa(&isa);
  *kernels = {&segment_kernels_table(isa), &segment_lookup_kernels_table(isa)};
  return status;
}

/// The segment that position p is in.
int64_t segment_of(const SegmentPlan& plan, int64_t p) {
  int64_t low = 0, high = plan.num_segments;  // begin_of(low) <= p < begin_of(high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (plan.begin_of(middle) <= p ? low : high) = middle;
  }
  return low;
}

/// Calls the first lines of a factor's rows: each lies in a page of its own, whose address takes as long to find as the
/// line to come, and the processor reads ahead only from the second line on.
void call_rows(ConstMatrix factor, int64_t rows, int64_t element_bytes) {
  const char* row = static_cast<const char*>(factor.data);
  for (int64_t r = 0; r < rows; ++r, row += factor.row_stride * element_bytes) {
    __builtin_prefetch(row);
    __builtin_prefetch(row + 64);
  }
}

/// body(slot, begin, end) for each segment's part of the positions [begin, end), where there is something to add.
template <class Body>
void for_each_part(const SegmentPlan& plan, const SegmentSlot* slots, int64_t begin, int64_t end, const Body& body) {
  for (int64_t s = segment_of(plan, begin); begin < end; ++s) {
    const int64_t segment_end = plan.begin_of(s + 1), part_end = segment_end < end ? segment_end : end;
    const int32_t slot = plan.slots[s];
    if (slot >= 0 && slots[slot].rank > 0 && begin < part_end) body(slots[slot], begin, part_end);
    begin = part_end > begin ? part_end : begin;
  }
}

/// da of a one-hot x. Ranks are shared out, so that no two threads add to one sum.
void add_up_columns(const Context& context, const SegmentBackward& args, SegmentLookupKernels::AddUp add_up) {
  const SegmentPlan& plan = args.plan;
  parallel_for(context, args.shape.v_stride, grain(plan.num_positions()), [&](int64_t begin, int64_t end) {
    for (int64_t segment = 0; segment < plan.num_segments; ++segment) {
      const int32_t slot = plan.slots[segment];
      if (slot < 0 || !args.da[slot]) continue;
      const int64_t rank = args.slots[slot].rank;
      add_up(begin, rank < end ? rank : end, plan.begin_of(segment), plan.begin_of(segment + 1), plan, args.g,
             args.shape.v_stride, args.one_hot.columns, args.one_hot.frozen_column, args.shape.in_features,
             args.da[slot]);
    }
  });
}

template <bool kShrink, bool kExpand>
Status run_forward(const Context& context, const SegmentForward& args) {
  Kernels kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;
  const SegmentShape& s = args.shape;
  const auto shrink = kernels.dense->shrink[index(s.dtype)];
  const auto look_up = kernels.lookup->look_up[index(s.dtype)];
  const auto expand = kernels.dense->expand[index(s.dtype)];
  const int64_t* columns = args.one_hot.columns;
  const int64_t work = s.v_stride * ((kShrink && !columns ? s.in_features : 0) + (kExpand ? s.out_features : 0));
  parallel_for(context, args.plan.num_positions(), grain(work), [&](int64_t begin, int64_t end) {
    // While a segment's few tokens are expanded, the next one's A is under way.
    const auto call_next = [&](int64_t first, int64_t last) {
      if (last - first > kFewTokens || last == end) return;
      const int32_t next = args.plan.slots[segment_of(args.plan, last)];
      if (next >= 0) call_rows(args.slots[next].a, args.slots[next].rank, dtype_bytes(args.slots[next].dtype));
    };
    for_each_part(args.plan, args.slots, begin, end, [&](const SegmentSlot& slot, int64_t first, int64_t last) {
      if (kShrink && columns) {
        look_up(first, last, args.plan, columns, slot.a, slot.dtype, slot.rank, args.v, s.v_stride);
      } else if (kShrink) {
        shrink(first, last, args.plan, args.x, s.in_features, slot.a, slot.dtype, slot.rank, 1.0, slot.dropout, args.v,
               s.v_stride);
      }
      if (kShrink && kExpand && !columns) call_next(first, last);
      if (kExpand) {
        expand(first, last, args.plan, args.v, s.v_stride, transposed(slot.b), slot.dtype, slot.rank, slot.scaling,
               Dropout{}, args.y, s.out_features);
      }
    });
  });
  return {};
}

}  // namespace

Status segments_shrink_cpu(const Context& context, const SegmentForward& args) {
  return run_forward<true, false>(context, args);
}

Status segments_expand_cpu(const Context& context, const SegmentForward& args) {
  return run_forward<false, true>(context, args);
}

Status segments_forward_cpu(const Context& context, const SegmentForward& args) {
  return run_forward<true, true>(context, args);
}

Status segments_backward_cpu(const Context& context, const SegmentBackward& args) {
  Kernels kernels;
  if (const Status status = find_kernels(&kernels); !status.is_ok()) return status;
  const SegmentShape& s = args.shape;
  const SegmentPlan& plan = args.plan;
  const auto shrink = kernels.dense->shrink[index(s.dtype)];
  const auto expand = kernels.dense->expand[index(s.dtype)];
  const auto outer = kernels.dense->outer[index(s.dtype)];

  if (args.dx.data || args.da) {
    const int64_t work = s.v_stride * (s.out_features + (args.dx.data ? s.in_features : 0));
    parallel_for(context, plan.num_positions(), grain(work), [&](int64_t begin, int64_t end) {
      for_each_part(plan, args.slots, begin, end, [&](const SegmentSlot& slot, int64_t first, int64_t last) {
        shrink(first, last, plan, args.dy, s.out_features, transposed(slot.b), slot.dtype, slot.rank, slot.scaling,
               Dropout{}, args.g, s.v_stride);
        if (!args.dx.data) return;
        expand(first, last, plan, args.g, s.v_stride, slot.a, slot.dtype, slot.rank, 1.0, slot.dropout, args.dx,
               s.in_features);
      });
    });
  }
  // A slot may have several segments: columns are shared out, so that no two threads add to one sum.
  const auto sums_over_tokens = [&](const void* v, ConstMatrix x, int64_t width, bool is_da, void* const* sums) {
    const int64_t blocks = (width + kDropoutBlock - 1) / kDropoutBlock;
    const int64_t work = kDropoutBlock * s.v_stride * plan.num_positions();
    parallel_for(context, blocks, grain(work), [&](int64_t begin, int64_t end) {
      const int64_t last_column = end * kDropoutBlock < width ? end * kDropoutBlock : width;
      for (int64_t segment = 0; segment < plan.num_segments; ++segment) {
        const int32_t index_of_slot = plan.slots[segment];
        if (index_of_slot < 0 || !sums[index_of_slot]) continue;
        const SegmentSlot& slot = args.slots[index_of_slot];
        outer(begin * kDropoutBlock, last_column, plan.begin_of(segment), plan.begin_of(segment + 1), plan, v,
              s.v_stride, slot.rank, x, width, is_da ? 1.0 : slot.scaling, is_da ? slot.dropout : Dropout{},
              sums[index_of_slot]);
      }
    });
  };
  if (args.da && args.one_hot.columns) {
    add_up_columns(context, args, kernels.lookup->add_up[index(s.dtype)]);
  } else if (args.da) {
    sums_over_tokens(args.g, args.x, s.in_features, true, args.da);
  }
  if (args.db) sums_over_tokens(args.v, args.dy, s.out_features, false, args.db);
  return {};
}

}  // namespace pylora
