// Convolutions and look-ups of many adapters without torch: their values, and on several threads the bits of one.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/segments.h"
#include "cpu/segments_conv.h"
#include "threads.h"

using namespace pylora;
using test::append;
using test::Bytes;
using test::normal;

namespace {

constexpr int64_t kRows = 5, kIn = 3, kOut = 7;
const int32_t kOrder[kRows] = {3, 0, 4, 1, 2}, kIndptr[] = {0, 1, 3, 3, 5}, kSlots[] = {-1, 1, 0, 0};
const int32_t kSlotOfRow[kRows] = {1, 0, 0, -1, 1};
constexpr int64_t kRanks[] = {9, 4};

SegmentPlan plan_of_rows() {
  SegmentPlan plan;
  plan.num_segments = 4;
  plan.order = kOrder;
  plan.indptr = kIndptr;
  plan.slots = kSlots;
  return plan;
}

Bytes bytes_of(const std::vector<float>& values) {
  const auto* p = reinterpret_cast<const unsigned char*>(values.data());
  return Bytes(p, p + values.size() * sizeof(float));
}

struct Factors {
  std::vector<float> a[2], b[2];
  std::vector<SegmentSlot> slots;

  Factors(int64_t width, int64_t out) {
    for (unsigned i = 0; i < 2; ++i) {
      a[i] = normal(kRanks[i] * width, 10 + i);
      b[i] = normal(out * kRanks[i], 20 + i);
      SegmentSlot slot;
      slot.a = {a[i].data(), width, 1};
      slot.b = {b[i].data(), kRanks[i], 1};
      slot.rank = kRanks[i];
      slot.scaling = 0.5 + i;
      slots.push_back(slot);
    }
  }
};

void check_near(const char* what, double got, double expected) {
  CHECK(std::fabs(got - expected) <= 1e-4 * (1 + std::fabs(expected)), "%s: %g, expected %g", what, got, expected);
}

// ---- convolutions ----

ConvGeometry plane(int64_t stride, int64_t padding) {
  ConvGeometry g;
  const int64_t in[2] = {19, 13}, kernel[2] = {3, 2};
  for (int d = 0; d < 2; ++d) {
    g.in[d + 1] = in[d];
    g.kernel[d + 1] = kernel[d];
    g.stride[d + 1] = stride;
    g.padding[d + 1] = padding;
    g.out[d + 1] = (in[d] + 2 * padding - kernel[d]) / stride + 1;
  }
  return g;
}

/// v of rank r of a slot at position (y, x) of a row.
double slide(const ConvGeometry& g, const float* image, const float* a, int64_t y, int64_t x) {
  double sum = 0;
  for (int64_t c = 0; c < kIn; ++c) {
    for (int64_t i = 0; i < g.kernel[1]; ++i) {
      for (int64_t j = 0; j < g.kernel[2]; ++j) {
        const int64_t row = y * g.stride[1] - g.padding[1] + i, column = x * g.stride[2] - g.padding[2] + j;
        if (row < 0 || row >= g.in[1] || column < 0 || column >= g.in[2]) continue;
        sum += static_cast<double>(image[(c * g.in[1] + row) * g.in[2] + column]) *
               a[(c * g.kernel[1] + i) * g.kernel[2] + j];
      }
    }
  }
  return sum;
}

void check_conv(const ConvGeometry& g) {
  const Factors factors(kIn * g.taps(), kOut);
  const std::vector<float> x = normal(kRows * kIn * g.plane(), 1), before = normal(kRows * kOut * g.positions(), 2);
  std::vector<float> y;
  const auto run = [&](const Context& context, std::vector<float>* result) {
    *result = before;
    SegmentConv args;
    args.geometry = g;
    args.in_channels = kIn;
    args.out_channels = kOut;
    args.v_stride = kRanks[0];
    args.plan = plan_of_rows();
    args.slots = factors.slots.data();
    args.num_slots = 2;
    args.x = x.data();
    args.y = result->data();
    const test::AlignedBuffer v(kRows * kRanks[0] * g.positions() * 4), work(segments_conv_workspace_bytes(args));
    args.v = v.data.get();
    args.workspace = work.data.get();
    CHECK(segments_conv_cpu(context, args).is_ok(), "conv");
  };
  run(Context{}, &y);
  for (int64_t n = 0; n < kRows; ++n) {
    for (int64_t o = 0; o < kOut; ++o) {
      for (int64_t p = 0; p < g.positions(); ++p) {
        const size_t i = static_cast<size_t>((n * kOut + o) * g.positions() + p);
        const int32_t slot = kSlotOfRow[n];
        if (slot < 0) {
          CHECK(y[i] == before[i], "row %d was touched", static_cast<int>(n));
          continue;
        }
        double expected = before[i];
        for (int64_t r = 0; r < kRanks[slot]; ++r)
          expected += factors.slots[static_cast<size_t>(slot)].scaling * factors.b[slot][o * kRanks[slot] + r] *
                      slide(g, x.data() + n * kIn * g.plane(), factors.a[slot].data() + r * kIn * g.taps(),
                            p / g.out[2], p % g.out[2]);
        check_near("conv", y[i], expected);
      }
    }
  }
  test::check_threads("conv", [&](const Context& context) {
    std::vector<float> own;
    run(context, &own);
    return bytes_of(own);
  });
}

// ---- look-ups ----

void check_look_up() {
  constexpr int64_t kColumns = 11, kFrozen = 4;
  const Factors factors(kColumns, kOut);
  const int64_t columns[kRows] = {4, 10, 0, 99, 10};  // 99: of the row without a slot
  const std::vector<float> dy = normal(kRows * kOut, 3);
  std::vector<float> v, da[2], db[2];
  const auto run = [&](const Context& context) {
    std::vector<float> y(static_cast<size_t>(kRows * kOut)), g(static_cast<size_t>(kRows * kRanks[0]));
    std::vector<float> own_v(g.size()), own_da[2], own_db[2];
    void *da_sums[2], *db_sums[2];
    for (size_t i = 0; i < 2; ++i) {
      own_da[i].assign(static_cast<size_t>(kRanks[i] * kColumns), 0.0f);
      own_db[i].assign(static_cast<size_t>(kRanks[i] * kOut), 0.0f);
      da_sums[i] = own_da[i].data();
      db_sums[i] = own_db[i].data();
    }
    SegmentForward forward;
    forward.shape = {kColumns, kOut, kRanks[0], DType::f32};
    forward.plan = plan_of_rows();
    forward.slots = factors.slots.data();
    forward.one_hot = {columns, -1};
    forward.v = own_v.data();
    forward.y = {y.data(), kOut, 1};
    CHECK(segments_forward_cpu(context, forward).is_ok(), "look up");
    SegmentBackward backward;
    backward.shape = forward.shape;
    backward.plan = forward.plan;
    backward.slots = forward.slots;
    backward.one_hot = {columns, kFrozen};
    backward.dy = {dy.data(), kOut, 1};
    backward.v = own_v.data();
    backward.g = g.data();
    backward.da = da_sums;
    backward.db = db_sums;
    CHECK(segments_backward_cpu(context, backward).is_ok(), "add up");
    Bytes all = bytes_of(y);
    for (size_t i = 0; i < 2; ++i) {
      append(&all, bytes_of(own_da[i]));
      append(&all, bytes_of(own_db[i]));
    }
    return std::pair(all, own_da[0]);
  };
  const std::vector<float> da_of_first = run(Context{}).second;
  for (int64_t r = 0; r < kRanks[0]; ++r) {
    for (int64_t c = 0; c < kColumns; ++c) {
      double expected = 0;  // slot 0 has rows 1 and 2
      for (int64_t row : {1, 2})
        for (int64_t o = 0; columns[row] == c && o < kOut; ++o)
          expected += 0.5 * static_cast<double>(dy[row * kOut + o]) * factors.b[0][o * kRanks[0] + r];
      check_near("da", da_of_first[static_cast<size_t>(r * kColumns + c)], expected);
    }
  }
  test::check_threads("look up", [&](const Context& context) { return run(context).first; });
}

}  // namespace

int main() {
  test::with_each_isa([] {
    for (const auto& [stride, padding] : {std::pair<int64_t, int64_t>{1, 1}, {1, 0}, {2, 1}, {3, 0}})
      check_conv(plane(stride, padding));
    check_look_up();
  });
  return test::failures() == 0 ? 0 : 1;
}
