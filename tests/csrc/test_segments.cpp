// The launchers over many adapters as an engine without torch calls them: own buffers, every instruction set.
#include "cpu/segments.h"

#include <cmath>
#include <vector>

#include "bgmv/bgmv.h"
#include "check.h"
#include "cpu/isa.h"
#include "inputs.h"

using namespace pylora;
using test::normal;

namespace {

constexpr int64_t kTokens = 11, kIn = 70, kOut = 45, kStride = 9;
constexpr int64_t kRanks[] = {1, 9, 4};
constexpr int32_t kTokenSlots[kTokens] = {2, -1, 0, 1, 1, 2, -1, 1, 0, 2, 2};

struct Adapter {
  int64_t rank;
  double scaling;
  std::vector<float> a, b, da, db;
};

std::vector<Adapter> make_adapters() {
  std::vector<Adapter> adapters;
  for (int64_t rank : kRanks) {
    const auto seed = static_cast<unsigned>(rank);
    adapters.push_back({rank, 0.5 + static_cast<double>(rank), normal(rank * kIn, seed), normal(kOut * rank, seed + 1),
                        std::vector<float>(static_cast<size_t>(rank * kIn)),
                        std::vector<float>(static_cast<size_t>(rank * kOut))});
  }
  return adapters;
}

std::vector<SegmentSlot> slots_of(const std::vector<Adapter>& adapters) {
  std::vector<SegmentSlot> slots;
  for (const Adapter& each : adapters) {
    SegmentSlot slot;
    slot.a = {each.a.data(), kIn, 1};
    slot.b = {each.b.data(), each.rank, 1};
    slot.rank = each.rank;
    slot.scaling = each.scaling;
    slots.push_back(slot);
  }
  return slots;
}

double dot_a(const Adapter& adapter, const std::vector<float>& x, int64_t t, int64_t r) {
  double sum = 0;
  for (int64_t i = 0; i < kIn; ++i)
    sum += static_cast<double>(x[t * kIn + i]) * adapter.a[r * kIn + i];
  return sum;
}

double dot_b(const Adapter& adapter, const std::vector<float>& dy, int64_t t, int64_t r) {
  double sum = 0;
  for (int64_t o = 0; o < kOut; ++o)
    sum += static_cast<double>(dy[t * kOut + o]) * adapter.b[o * adapter.rank + r];
  return sum * adapter.scaling;
}

void check_near(const char* what, double got, double expected) {
  CHECK(std::fabs(got - expected) <= 1e-3 * (1 + std::fabs(expected)), "%s: %g, expected %g", what, got, expected);
}

void check_forward(const std::vector<Adapter>& adapters, const SegmentPlan& plan, const std::vector<float>& x,
                   std::vector<float>& v) {
  const auto before = normal(kTokens * kOut, 7);
  auto y = before;
  const auto slots = slots_of(adapters);
  SegmentForward args;
  args.shape = {kIn, kOut, kStride, DType::f32};
  args.plan = plan;
  args.slots = slots.data();
  args.x = {x.data(), kIn, 1};
  args.y = {y.data(), kOut, 1};
  args.v = v.data();
  CHECK(segments_forward_cpu(Context{}, args).is_ok(), "forward");
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t o = 0; o < kOut; ++o) {
      const size_t i = static_cast<size_t>(t * kOut + o);
      if (kTokenSlots[t] < 0) {
        CHECK(y[i] == before[i], "token %d was touched", static_cast<int>(t));
        continue;
      }
      const Adapter& adapter = adapters[static_cast<size_t>(kTokenSlots[t])];
      double expected = before[i];
      for (int64_t r = 0; r < adapter.rank; ++r)
        expected += adapter.scaling * dot_a(adapter, x, t, r) * adapter.b[o * adapter.rank + r];
      check_near("y", y[i], expected);
    }
  }
}

void check_backward(std::vector<Adapter>& adapters, const SegmentPlan& plan, const std::vector<float>& x,
                    const std::vector<float>& v) {
  const auto dy = normal(kTokens * kOut, 8);
  std::vector<float> dx(static_cast<size_t>(kTokens * kIn)), g(static_cast<size_t>(kTokens * kStride));
  const auto slots = slots_of(adapters);
  std::vector<void*> da, db;
  for (Adapter& each : adapters) {
    da.push_back(each.da.data());
    db.push_back(each.db.data());
  }
  SegmentBackward args;
  args.shape = {kIn, kOut, kStride, DType::f32};
  args.plan = plan;
  args.slots = slots.data();
  args.dy = {dy.data(), kOut, 1};
  args.x = {x.data(), kIn, 1};
  args.v = v.data();
  args.dx = {dx.data(), kIn, 1};
  args.g = g.data();
  args.da = da.data();
  args.db = db.data();
  CHECK(segments_backward_cpu(Context{}, args).is_ok(), "backward");
  for (size_t s = 0; s < adapters.size(); ++s) {
    const Adapter& adapter = adapters[s];
    for (int64_t r = 0; r < adapter.rank; ++r) {
      double da_expected = 0, db_expected = 0;
      for (int64_t t = 0; t < kTokens; ++t) {
        if (kTokenSlots[t] != static_cast<int32_t>(s)) continue;
        da_expected += dot_b(adapter, dy, t, r) * x[t * kIn + 3];
        db_expected += adapter.scaling * dot_a(adapter, x, t, r) * dy[t * kOut + 5];
      }
      check_near("da", adapter.da[r * kIn + 3], da_expected);
      check_near("db", adapter.db[r * kOut + 5], db_expected);
    }
  }
  for (int64_t t = 0; t < kTokens; ++t) {
    double expected = 0;
    if (kTokenSlots[t] >= 0) {
      const Adapter& adapter = adapters[static_cast<size_t>(kTokenSlots[t])];
      for (int64_t r = 0; r < adapter.rank; ++r)
        expected += dot_b(adapter, dy, t, r) * adapter.a[r * kIn + 6];
    }
    check_near("dx", dx[t * kIn + 6], expected);
  }
}

}  // namespace

int main() {
  int run = 0;
  for (Isa isa : kAllIsas) {
    if (!isa_built(isa) || !isa_supported(isa)) continue;
    CHECK(set_isa(isa_name(isa)).is_ok(), "set_isa");
    auto adapters = make_adapters();
    std::vector<int32_t> scratch(static_cast<size_t>(bgmv::scratch_size(kTokens, 3)));
    const SegmentPlan plan = bgmv::group_by_slot(kTokenSlots, kTokens, 3, scratch.data());
    CHECK(plan.num_positions() == 9, "%d tokens have a slot", static_cast<int>(plan.num_positions()));
    const auto x = normal(kTokens * kIn, 6);
    std::vector<float> v(static_cast<size_t>(kTokens * kStride));
    check_forward(adapters, plan, x, v);
    check_backward(adapters, plan, x, v);
    ++run;
  }
  CHECK(run > 0, "no instruction set");
  return test::failures() == 0 ? 0 : 1;
}
