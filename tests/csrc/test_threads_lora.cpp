// The lora launchers on several threads and from several callers: the bits of one thread, with and without dropout.
#include "lora/heuristics.h"
#include "lora/lora.h"
#include "threads.h"

using namespace pylora;
using test::AlignedBuffer;
using test::append;
using test::Bytes;
using test::random_elements;

namespace {

const int64_t kRng[2] = {0x123456789abcdef, 42};

struct Case {
  lora::Shape shape;
  double dropout_p;
  Bytes x, a, b, y, dy, dx;

  Case(const lora::Shape& s, double p) : shape(s), dropout_p(p) {
    x = random_elements(s.dtype, s.num_tokens * s.in_features, 1);
    a = random_elements(s.factor_dtype, s.rank * s.in_features, 2);
    b = random_elements(s.factor_dtype, s.out_features * s.rank, 3);
    y = random_elements(s.dtype, s.num_tokens * s.out_features, 4);
    dy = random_elements(s.dtype, s.num_tokens * s.out_features, 5);
    dx = random_elements(s.dtype, s.num_tokens * s.in_features, 6);
  }

  /// y, v, and from them dx, da and db.
  Bytes run(const Context& context) const {
    const lora::Shape& s = shape;
    Bytes y_out = y, v(static_cast<size_t>(s.num_tokens * s.rank * dtype_bytes(accumulator_dtype(s.dtype))));
    lora::ForwardArgs forward;
    forward.shape = s;
    forward.scaling = 1.5;
    forward.dropout = make_dropout(dropout_p, kRng);
    forward.x = {x.data(), s.in_features, 1};
    forward.a = {a.data(), s.in_features, 1};
    forward.b = {b.data(), s.rank, 1};
    forward.y = {y_out.data(), s.out_features, 1};
    forward.v = v.data();
    AlignedBuffer forward_space(lora::forward_workspace_bytes(s));
    forward.workspace = forward_space.data.get();
    CHECK(lora::forward_cpu(context, forward).is_ok(), "forward");

    Bytes dx_out = dx, da(a.size()), db(b.size());
    lora::BackwardArgs backward;
    backward.shape = s;
    backward.scaling = 1.5;
    backward.dropout = forward.dropout;
    backward.dy = {dy.data(), s.out_features, 1};
    backward.x = forward.x;
    backward.a = forward.a;
    backward.b = forward.b;
    backward.v = v.data();
    backward.dx = {dx_out.data(), s.in_features, 1};
    backward.da = da.data();
    backward.db = db.data();
    AlignedBuffer backward_space(lora::backward_workspace_bytes(s));
    backward.workspace = backward_space.data.get();
    CHECK(lora::backward_cpu(context, backward).is_ok(), "backward");
    for (const Bytes* more : {&v, &dx_out, &da, &db})
      append(&y_out, *more);
    return y_out;
  }

  /// v alone, as for a base product that adds the rest.
  Bytes run_shrink(const Context& context) const {
    Bytes v(static_cast<size_t>(shape.num_tokens * shape.rank * dtype_bytes(accumulator_dtype(shape.dtype))));
    lora::ShrinkArgs args;
    args.shape = shape;
    args.dropout = make_dropout(dropout_p, kRng);
    args.x = {x.data(), shape.in_features, 1};
    args.a = {a.data(), shape.in_features, 1};
    args.v = v.data();
    const AlignedBuffer workspace(lora::shrink_workspace_bytes(args));
    args.workspace = workspace.data.get();
    CHECK(lora::shrink_cpu(context, args).is_ok(), "shrink");
    return v;
  }

  Bytes run_dropout(const Context& context) const {
    Bytes out(x.size());
    lora::DropoutArgs args;
    args.num_tokens = shape.num_tokens;
    args.width = shape.in_features;
    args.dtype = shape.dtype;
    args.dropout = make_dropout(0.5, kRng);
    args.x = {x.data(), shape.in_features, 1};
    args.out = {out.data(), shape.in_features, 1};
    CHECK(lora::dropout_cpu(context, args).is_ok(), "dropout");
    return out;
  }
};

}  // namespace

int main() {
  test::with_each_isa([] {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      const DType factor_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
      for (int64_t tokens : {1, 2, 71})
        for (int64_t rank : {1, 9})
          for (double p : {0.0, 0.25}) {
            const Case c({tokens, 200, 137, rank, dtype, factor_dtype}, p);
            char what[80];
            std::snprintf(what, sizeof what, "%d tokens, rank %d, dtype %d, dropout %g", int(tokens), int(rank),
                          int(dtype), p);
            test::check_threads(what, [&](const Context& context) { return c.run(context); });
          }
      const Case c({71, 200, 137, 9, dtype, dtype}, 0);
      test::check_threads("factors of x's dtype", [&](const Context& context) { return c.run(context); });
      test::check_threads("shrink", [&](const Context& context) { return c.run_shrink(context); });
      test::check_threads("dropout", [&](const Context& context) { return c.run_dropout(context); });
    }
  });
  return test::failures() == 0 ? 0 : 1;
}
