// The dora launchers on several threads and from several callers: the bits of one thread.
#include "dora/dora.h"
#include "dora/heuristics.h"
#include "threads.h"

using namespace pylora;
using test::AlignedBuffer;
using test::append;
using test::Bytes;
using test::random_elements;

namespace {

const unsigned char* begin_of(const std::vector<double>& values) {
  return reinterpret_cast<const unsigned char*>(values.data());
}

Bytes bytes_of(const std::vector<double>& values) {
  return Bytes(begin_of(values), begin_of(values) + values.size() * 8);
}

void check_norms(DType dtype) {
  const int64_t out = 101, in = 515, rank = 9;
  const DType factor_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
  const Bytes w = random_elements(dtype, out * in, 1), a = random_elements(factor_dtype, rank * in, 2),
              b = random_elements(factor_dtype, out * rank, 3),
              cross = random_elements(accumulator_dtype(dtype), rank * out, 4);
  test::check_threads("norms", [&](const Context& context) {
    std::vector<double> squares(out), norms(out), from_cross(out);
    dora::NormsArgs args;
    args.out_features = out;
    args.in_features = in;
    args.rank = rank;
    args.dtype = dtype;
    args.factor_dtype = factor_dtype;
    args.scaling = 1.5;
    args.weight = {w.data(), in, 1};
    args.a = {a.data(), in, 1};
    args.b = {b.data(), rank, 1};
    args.norms = norms.data();
    const AlignedBuffer workspace(dora::norms_workspace_bytes(args));
    args.workspace = workspace.data.get();
    CHECK(dora::squares_cpu(context, {out, in, dtype, args.weight, squares.data()}).is_ok(), "squares");
    CHECK(dora::norms_cpu(context, args).is_ok(), "norms");
    args.norms = from_cross.data();
    CHECK(dora::norms_from_cross_cpu(context, {args, {cross.data(), out, 1}, squares.data()}).is_ok(), "cross");
    Bytes all = bytes_of(squares);
    append(&all, bytes_of(norms));
    append(&all, bytes_of(from_cross));
    return all;
  });
}

void check_scale(DType dtype) {
  const int64_t tokens = 130, out = 600;
  const Bytes z = random_elements(dtype, tokens * out, 1), dy = random_elements(dtype, tokens * out, 2),
              bias = random_elements(dtype, out, 3), magnitude = random_elements(dtype, out, 4);
  std::vector<double> norms(out, 1.25);
  test::check_threads("scale", [&](const Context& context) {
    Bytes y(z.size()), dz(z.size()), dmagnitude(static_cast<size_t>(out * dtype_bytes(accumulator_dtype(dtype))));
    dora::ScaleArgs forward;
    forward.num_tokens = tokens;
    forward.out_features = out;
    forward.dtype = forward.magnitude_dtype = dtype;
    forward.magnitude = magnitude.data();
    forward.norms = norms.data();
    forward.z = {z.data(), out, 1};
    forward.bias = bias.data();
    forward.y = {y.data(), out, 1};
    CHECK(dora::scale_cpu(context, forward).is_ok(), "scale");
    dora::ScaleBackwardArgs backward;
    backward.num_tokens = tokens;
    backward.out_features = out;
    backward.dtype = backward.magnitude_dtype = dtype;
    backward.magnitude = magnitude.data();
    backward.norms = norms.data();
    backward.dy = {dy.data(), out, 1};
    backward.z = {z.data(), out, 1};
    backward.dz = {dz.data(), out, 1};
    backward.dmagnitude = dmagnitude.data();
    CHECK(dora::scale_backward_cpu(context, backward).is_ok(), "scale_backward");
    append(&y, dz);
    append(&y, dmagnitude);
    return y;
  });
}

}  // namespace

int main() {
  test::with_each_isa([] {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      check_norms(dtype);
      check_scale(dtype);
    }
  });
  return test::failures() == 0 ? 0 : 1;
}
