// Selection on several threads and from several callers: the bits of one thread.
#include "select/select.h"
#include "threads.h"

using namespace pylora;
using test::AlignedBuffer;
using test::Bytes;

namespace {

void check(DType dtype, int64_t size) {
  const Bytes x = test::random_elements(dtype, size, 1);
  test::check_threads("keep_largest", [&](const Context& context) {
    const AlignedBuffer workspace(select::threshold_workspace_bytes(size, dtype));
    const select::ThresholdArgs args{size, dtype, x.data(), size / 3, workspace.data.get()};
    select::Threshold found;
    CHECK(select::magnitude_threshold_cpu(context, args, &found).is_ok(), "threshold");
    CHECK(found.larger < args.count && args.count <= found.larger + found.equal, "%ld larger", long(found.larger));
    Bytes out(x.size(), 7);
    CHECK(select::keep_from_cpu(context, size, dtype, x.data(), found.bits, out.data()).is_ok(), "keep");
    return out;
  });
}

}  // namespace

int main() {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64})
    for (int64_t size : {3, 1001, 60007})
      check(dtype, size);
  return test::failures() == 0 ? 0 : 1;
}
