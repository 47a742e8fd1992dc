// The lora launchers as an engine without torch calls them: default Context, own buffers, every instruction set.
#include "lora/lora.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "inputs.h"
#include "lora/heuristics.h"

using namespace pylora;
using test::AlignedBuffer;
using test::normal;

namespace {

void check_close(const char* what, const std::vector<float>& got, const std::vector<double>& expected) {
  double worst = 0, size = 1e-30;
  for (size_t i = 0; i < got.size(); ++i) {
    worst = std::fmax(worst, std::isfinite(got[i]) ? std::fabs(got[i] - expected[i]) : INFINITY);
    size = std::fmax(size, std::fabs(expected[i]));
  }
  CHECK(worst <= 1e-5 * size, "%s: error %g of magnitude %g", what, worst, size);
}

void check_shape(const lora::Shape& s) {
  const int64_t n = s.num_tokens, in = s.in_features, out = s.out_features, r = s.rank;
  const auto x = normal(n * in, 1), a = normal(r * in, 2), b = normal(out * r, 3), dy = normal(n * out, 4);
  std::vector<float> y(static_cast<size_t>(n * out), 0.5f), v(static_cast<size_t>(n * r));
  std::vector<float> dx(static_cast<size_t>(n * in), 0.25f), da(a.size()), db(b.size());
  const double scaling = 1.5;

  lora::ForwardArgs forward;
  forward.shape = s;
  forward.scaling = scaling;
  forward.x = {x.data(), in, 1};
  forward.a = {a.data(), in, 1};
  forward.b = {b.data(), r, 1};
  forward.y = {y.data(), out, 1};
  forward.v = v.data();
  AlignedBuffer forward_space(lora::forward_workspace_bytes(s));
  forward.workspace = forward_space.data.get();
  CHECK(lora::forward_cpu(Context{}, forward).is_ok(), "forward");

  lora::BackwardArgs backward;
  backward.shape = s;
  backward.scaling = scaling;
  backward.dy = {dy.data(), out, 1};
  backward.x = forward.x;
  backward.a = forward.a;
  backward.b = forward.b;
  backward.v = v.data();
  backward.dx = {dx.data(), in, 1};
  backward.da = da.data();
  backward.db = db.data();
  AlignedBuffer backward_space(lora::backward_workspace_bytes(s));
  backward.workspace = backward_space.data.get();
  CHECK(lora::backward_cpu(Context{}, backward).is_ok(), "backward");

  std::vector<double> y_ref(y.size(), 0.5), dx_ref(dx.size(), 0.25), da_ref(da.size()), db_ref(db.size());
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t q = 0; q < r; ++q) {
      double v_ref = 0, g_ref = 0;
      for (int64_t i = 0; i < in; ++i)
        v_ref += double(x[t * in + i]) * a[q * in + i];
      for (int64_t o = 0; o < out; ++o)
        g_ref += scaling * dy[t * out + o] * b[o * r + q];
      for (int64_t o = 0; o < out; ++o)
        y_ref[t * out + o] += scaling * v_ref * b[o * r + q];
      for (int64_t o = 0; o < out; ++o)
        db_ref[o * r + q] += scaling * dy[t * out + o] * v_ref;
      for (int64_t i = 0; i < in; ++i)
        dx_ref[t * in + i] += g_ref * a[q * in + i];
      for (int64_t i = 0; i < in; ++i)
        da_ref[q * in + i] += g_ref * x[t * in + i];
    }
  }
  check_close("y", y, y_ref);
  check_close("dx", dx, dx_ref);
  check_close("da", da, da_ref);
  check_close("db", db, db_ref);
}

}  // namespace

int main() {
  for (Isa isa : kAllIsas) {
    if (!isa_built(isa)) continue;
    if (!isa_supported(isa)) {
      std::printf("skipped: this CPU has no %s\n", isa_name(isa));
      CHECK(!set_isa(isa_name(isa)).is_ok(), "a set the CPU lacks is refused");
      continue;
    }
    CHECK(set_isa(isa_name(isa)).is_ok(), "%s", isa_name(isa));
    for (int64_t n : {0, 1, 5, 67})
      for (int64_t in : {1, 17, 64, 300})
        for (int64_t r : {1, 3, 16, 33})
          check_shape({n, in, 45, r, DType::f32, DType::f32});
  }
  CHECK(set_isa("sse9").code == Status::Code::invalid_argument, "an unknown set is refused");
  lora::ForwardArgs rankless;
  CHECK(!lora::forward_cpu(Context{}, rankless).is_ok(), "rank 0 is refused");
  return test::failures() == 0 ? 0 : 1;
}
