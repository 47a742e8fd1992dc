// The launchers over many adapters on several threads and from several callers: the bits of one thread. Segments are
// empty, short and long, a slot has two of them, ranks and factor dtypes differ, and a segment is cut between threads.
#include <cstdio>
#include <vector>

#include "bgmv/bgmv.h"
#include "cpu/segments.h"
#include "threads.h"

using namespace pylora;
using test::append;
using test::Bytes;
using test::random_elements;

namespace {

constexpr int64_t kIn = 200, kOut = 137, kStride = 17;
const int64_t kRng[2] = {0x123456789abcdef, 42};

struct Adapter {
  int64_t rank;
  DType dtype;
  Bytes a, b;
};

/// Slots 0 to 3, of which 2 adds nothing; slot 3 has dropout and a B that is stored transposed.
struct Adapters {
  std::vector<Adapter> adapters;
  std::vector<SegmentSlot> slots;

  Adapters(DType dtype, double p) {
    const DType narrow = dtype == DType::f64 ? DType::f64 : DType::f32;
    for (auto [rank, factor_dtype] : {std::pair<int64_t, DType>{1, dtype}, {17, narrow}, {0, dtype}, {9, dtype}}) {
      const auto seed = static_cast<unsigned>(10 * rank);
      adapters.push_back({rank, factor_dtype, random_elements(factor_dtype, rank * kIn, seed),
                          random_elements(factor_dtype, kOut * rank, seed + 1)});
    }
    for (const Adapter& each : adapters) {
      SegmentSlot slot;
      slot.a = {each.a.data(), kIn, 1};
      slot.b = {each.b.data(), each.rank, 1};
      slot.rank = each.rank;
      slot.scaling = 0.5 + static_cast<double>(each.rank);
      slot.dtype = each.dtype;
      slots.push_back(slot);
    }
    slots[3].b = {adapters[3].b.data(), 1, kOut};
    slots[3].dropout = make_dropout(p, kRng);
  }
};

/// Segments of the rows, in an order that is not the batch's.
struct Plan {
  std::vector<int32_t> order, indptr, slots;
  SegmentPlan plan;

  explicit Plan(int64_t tokens_per_row) {
    indptr = {0, 0, 3, 4, 4, 21, 22, 23};
    slots = {1, -1, 3, 0, 1, 2, 3};
    for (int32_t i = 0; i < 23; ++i)
      order.push_back(i * 7 % 23);
    plan.num_segments = 7;
    plan.tokens_per_row = tokens_per_row;
    plan.order = order.data();
    plan.indptr = indptr.data();
    plan.slots = slots.data();
  }
};

/// Of one plan: v and y of the whole op and of its halves, and from v the gradients.
Bytes run(const Context& context, const Adapters& adapters, const SegmentPlan& plan, int64_t tokens, DType dtype) {
  const int64_t wide = dtype_bytes(accumulator_dtype(dtype));
  const Bytes x = random_elements(dtype, tokens * kIn, 1), dy = random_elements(dtype, tokens * kOut, 2);
  Bytes y = random_elements(dtype, tokens * kOut, 3), y_halves = y, dx = random_elements(dtype, tokens * kIn, 4);
  Bytes v(static_cast<size_t>(tokens * kStride * wide)), v_halves = v, g = v;
  SegmentForward forward;
  forward.shape = {kIn, kOut, kStride, dtype};
  forward.plan = plan;
  forward.slots = adapters.slots.data();
  forward.x = {x.data(), kIn, 1};
  forward.y = {y.data(), kOut, 1};
  forward.v = v.data();
  CHECK(segments_forward_cpu(context, forward).is_ok(), "forward");
  forward.y = {y_halves.data(), kOut, 1};
  forward.v = v_halves.data();
  CHECK(segments_shrink_cpu(context, forward).is_ok() && segments_expand_cpu(context, forward).is_ok(), "halves");
  CHECK(v_halves == v && y_halves == y, "the halves give the bits of the whole");

  std::vector<Bytes> da, db;
  std::vector<void*> da_sums, db_sums;
  for (const Adapter& each : adapters.adapters) {
    da.emplace_back(static_cast<size_t>(each.rank * kIn * wide));
    db.emplace_back(static_cast<size_t>(each.rank * kOut * wide));
  }
  for (size_t i = 0; i < da.size(); ++i) {
    da_sums.push_back(i == 0 ? nullptr : da[i].data());
    db_sums.push_back(db[i].data());
  }
  SegmentBackward backward;
  backward.shape = forward.shape;
  backward.plan = plan;
  backward.slots = forward.slots;
  backward.dy = {dy.data(), kOut, 1};
  backward.x = forward.x;
  backward.v = v.data();
  backward.dx = {dx.data(), kIn, 1};
  backward.g = g.data();
  backward.da = da_sums.data();
  backward.db = db_sums.data();
  CHECK(segments_backward_cpu(context, backward).is_ok(), "backward");
  Bytes all = y;
  append(&all, v);
  append(&all, dx);
  for (size_t i = 0; i < da.size(); ++i) {
    append(&all, da[i]);
    append(&all, db[i]);
  }
  return all;
}

}  // namespace

int main() {
  test::with_each_isa([] {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      for (double p : {0.0, 0.25}) {
        const Adapters adapters(dtype, p);
        for (int64_t tokens_per_row : {1, 3}) {
          const Plan plan(tokens_per_row);
          char what[80];
          std::snprintf(what, sizeof what, "%d tokens a row, dtype %d, dropout %g", int(tokens_per_row), int(dtype), p);
          test::check_threads(what, [&](const Context& context) {
            return run(context, adapters, plan.plan, 23 * tokens_per_row, dtype);
          });
        }
      }
      const Adapters adapters(dtype, 0);
      const std::vector<int32_t> token_slots = {3, -1, 1, 0, 2, 1, 1, 3, -1, 0, 1};
      const auto tokens = static_cast<int64_t>(token_slots.size());
      test::check_threads("slots of tokens", [&](const Context& context) {
        std::vector<int32_t> scratch(static_cast<size_t>(bgmv::scratch_size(tokens, 4)));
        return run(context, adapters, bgmv::group_by_slot(token_slots.data(), tokens, 4, scratch.data()), tokens,
                   dtype);
      });
    }
  });
  return test::failures() == 0 ? 0 : 1;
}
