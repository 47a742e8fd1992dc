// The selection launchers as an engine without torch calls them, against a sort.
#include "select/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"

using namespace pylora;

namespace {

template <class T, class Bits>
void check(DType dtype, int64_t size, double granularity) {
  std::mt19937 generator(static_cast<unsigned>(size));
  std::normal_distribution<double> normal;
  std::vector<T> x(static_cast<size_t>(size));
  for (T& value : x) {
    const double drawn = normal(generator);
    value = static_cast<T>(granularity > 0 ? std::round(drawn / granularity) * granularity : drawn);
  }
  std::vector<T> sorted(x);
  std::sort(sorted.begin(), sorted.end(), [](T a, T b) { return std::fabs(a) > std::fabs(b); });
  std::vector<uint64_t> workspace(static_cast<size_t>(select::threshold_workspace_bytes(size, dtype) / 8 + 1), ~0ull);
  for (int64_t count : {int64_t{1}, size / 3 + 1, size}) {
    select::Threshold found;
    CHECK(select::magnitude_threshold_cpu(Context{}, {size, dtype, x.data(), count, workspace.data()}, &found).is_ok(),
          "size %ld", long(size));
    const T expected = std::fabs(sorted[static_cast<size_t>(count - 1)]);
    Bits bits;
    std::memcpy(&bits, &expected, sizeof bits);
    CHECK(found.bits == bits, "count %ld of %ld", long(count), long(size));
    const auto larger = std::count_if(x.begin(), x.end(), [&](T v) { return std::fabs(v) > expected; });
    const auto equal = std::count_if(x.begin(), x.end(), [&](T v) { return std::fabs(v) == expected; });
    CHECK(found.larger == larger && found.equal == equal, "%ld and %ld", long(found.larger), long(found.equal));
    std::vector<T> out(x.size(), T(7));
    CHECK(select::keep_from_cpu(Context{}, size, dtype, x.data(), found.bits, out.data()).is_ok(), "keep");
    for (size_t i = 0; i < x.size(); ++i)
      CHECK(out[i] == (std::fabs(x[i]) >= expected ? x[i] : T(0)), "element %zu", i);
  }
}

}  // namespace

int main() {
  for (int64_t size : {1, 2, 7, 1000, 30001}) {
    for (double granularity : {0.0, 0.25}) {
      check<float, uint32_t>(DType::f32, size, granularity);
      check<double, uint64_t>(DType::f64, size, granularity);
    }
  }
  select::Threshold found;
  CHECK(!select::magnitude_threshold_cpu(Context{}, {3, DType::f32, nullptr, 4, nullptr}, &found).is_ok(), "too many");
  CHECK(!select::magnitude_threshold_cpu(Context{}, {3, DType::f32, nullptr, 0, nullptr}, &found).is_ok(), "none");
  return test::failures() == 0 ? 0 : 1;
}
