// The dora launchers as an engine without torch calls them: default Context, own buffers, every instruction set.
#include "dora/dora.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "dora/heuristics.h"
#include "inputs.h"

using namespace pylora;
using test::AlignedBuffer;
using test::normal;

namespace {

template <class T>
void check_close(const char* what, const std::vector<T>& got, const std::vector<double>& expected,
                 double tolerance = 1e-5) {
  double worst = 0, size = 1e-30;
  for (size_t i = 0; i < got.size(); ++i) {
    const double value = static_cast<double>(got[i]);
    worst = std::fmax(worst, std::isfinite(value) ? std::fabs(value - expected[i]) : INFINITY);
    size = std::fmax(size, std::fabs(expected[i]));
  }
  CHECK(worst <= tolerance * size, "%s: error %g of magnitude %g", what, worst, size);
}

struct Numbers {
  int64_t out, in, rank;
  double scaling = 1.5;
  std::vector<float> w, a, b, cross;
  std::vector<double> norms, squares;

  Numbers(int64_t out_features, int64_t in_features, int64_t r) : out(out_features), in(in_features), rank(r) {
    w = normal(out * in, 1);
    a = normal(r * in, 2);
    b = normal(out * r, 3);
    for (int64_t i = 0; i < in && out > 2; ++i) {  // row 2 cancels but for its first element
      double product = 0;
      for (int64_t q = 0; q < r; ++q)
        product += b[2 * r + q] * static_cast<double>(a[q * in + i]);
      w[2 * in + i] = static_cast<float>(-scaling * product) + (i == 0 ? 1e-3f : 0.0f);
    }
    cross.resize(static_cast<size_t>(r * out));
    for (int64_t o = 0; o < out; ++o) {
      double norm = 0, square = 0;
      for (int64_t i = 0; i < in; ++i) {
        double element = w[o * in + i];
        square += element * element;
        for (int64_t q = 0; q < r; ++q)
          element += scaling * b[o * r + q] * a[q * in + i];
        norm += element * element;
      }
      norms.push_back(std::sqrt(norm));
      squares.push_back(square);
      for (int64_t q = 0; q < r; ++q) {
        double sum = 0;
        for (int64_t i = 0; i < in; ++i)
          sum += static_cast<double>(a[q * in + i]) * w[o * in + i];
        cross[q * out + o] = static_cast<float>(sum);
      }
    }
  }
};

void check_norms(int64_t out, int64_t in, int64_t rank) {
  const Numbers n(out, in, rank);
  std::vector<float> transposed(n.w.size());
  for (int64_t o = 0; o < out; ++o)
    for (int64_t i = 0; i < in; ++i)
      transposed[i * out + o] = n.w[o * in + i];
  std::vector<double> norms(static_cast<size_t>(out)), squares(norms.size());
  dora::NormsArgs args;
  args.out_features = out;
  args.in_features = in;
  args.rank = rank;
  args.scaling = n.scaling;
  args.a = {n.a.data(), in, 1};
  args.b = {n.b.data(), rank, 1};
  args.norms = norms.data();
  const AlignedBuffer workspace(dora::norms_workspace_bytes(args));
  args.workspace = workspace.data.get();
  for (const ConstMatrix weight : {ConstMatrix{n.w.data(), in, 1}, ConstMatrix{transposed.data(), 1, out}}) {
    args.weight = weight;
    CHECK(dora::norms_cpu(Context{}, args).is_ok(), "norms");
    check_close("norms", norms, n.norms);
    CHECK(dora::squares_cpu(Context{}, {out, in, DType::f32, weight, squares.data()}).is_ok(), "squares");
    check_close("squares", squares, n.squares);
    std::fill(norms.begin(), norms.end(), NAN);
    CHECK(dora::norms_from_cross_cpu(Context{}, {args, {n.cross.data(), out, 1}, n.squares.data()}).is_ok(), "cross");
    // Up to a thousandth of the squares may have cancelled.
    check_close("norms from the cross product", norms, n.norms, 2e-4);
    if (out > 2) {
      CHECK(std::fabs(norms[2] - n.norms[2]) <= 1e-6 * n.norms[2], "row that cancels: %g, expected %g", norms[2],
            n.norms[2]);
    }
  }
}

void check_scale(int64_t tokens, int64_t out) {
  const auto z = normal(tokens * out, 1), rest = normal(tokens * out, 2), bias = normal(out, 3), m = normal(out, 4);
  const auto dy = normal(tokens * out, 5);
  std::vector<double> norms(static_cast<size_t>(out)), y_ref, dz_ref, dm_ref(norms.size());
  for (int64_t o = 0; o < out; ++o)
    norms[o] = o % 7 == 3 ? 0.0 : 0.5 + 0.01 * static_cast<double>(o);
  for (int64_t i = 0; i < tokens * out; ++i) {
    const int64_t o = i % out;
    const double norm = norms[o] == 0 ? 1 : norms[o];
    y_ref.push_back(m[o] / norm * z[i] + rest[i] + bias[o]);
    dz_ref.push_back(m[o] / norm * dy[i]);
    dm_ref[o] += dy[i] * static_cast<double>(z[i]) / norm;
  }
  std::vector<float> y(z.size()), dz(z.size()), dm(norms.size());
  dora::ScaleArgs forward;
  forward.num_tokens = tokens;
  forward.out_features = out;
  forward.magnitude = m.data();
  forward.norms = norms.data();
  forward.z = {z.data(), out, 1};
  forward.rest = {rest.data(), out, 1};
  forward.bias = bias.data();
  forward.y = {y.data(), out, 1};
  CHECK(dora::scale_cpu(Context{}, forward).is_ok(), "scale");
  check_close("y", y, y_ref);
  dora::ScaleBackwardArgs backward;
  backward.num_tokens = tokens;
  backward.out_features = out;
  backward.magnitude = m.data();
  backward.norms = norms.data();
  backward.dy = {dy.data(), out, 1};
  backward.z = {z.data(), out, 1};
  backward.dz = {dz.data(), out, 1};
  backward.dmagnitude = dm.data();
  CHECK(dora::scale_backward_cpu(Context{}, backward).is_ok(), "scale_backward");
  check_close("dz", dz, dz_ref);
  check_close("dmagnitude", dm, dm_ref);
}

}  // namespace

int main() {
  for (Isa isa : kAllIsas) {
    if (!isa_built(isa)) continue;
    if (!isa_supported(isa)) {
      std::printf("skipped: this CPU has no %s\n", isa_name(isa));
      continue;
    }
    CHECK(set_isa(isa_name(isa)).is_ok(), "%s", isa_name(isa));
    for (int64_t out : {0, 1, 5, 6, 50, 101})
      for (int64_t in : {1, 17, 256, 515})
        for (int64_t rank : {1, 3, 16, 33})
          check_norms(out, in, rank);
    for (int64_t tokens : {0, 1, 3, 130})
      for (int64_t out : {1, 17, 256, 600})
        check_scale(tokens, out);
  }
  CHECK(!dora::norms_cpu(Context{}, dora::NormsArgs{}).is_ok(), "rank 0 is refused");
  return test::failures() == 0 ? 0 : 1;
}
