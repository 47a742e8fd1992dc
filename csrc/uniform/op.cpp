// pylora::uniform_: schema, checks, torch's generator, registration. Without derivatives.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/uniform.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include "binding/checks.h"
#include "binding/status.h"
#include "uniform/uniform.h"

namespace pylora::uniform {
namespace {

using at::Tensor;

void check(const Tensor& out, double bound, int64_t skip) {
  const binding::Checks check("uniform_");
  check.kernel_dtype("out", out);
  const double largest = std::numeric_limits<float>::max() / 2;
  TORCH_CHECK_VALUE(0 <= bound && bound <= largest, "uniform_: bound: expected a number in [0, ", largest, "], got ",
                    bound);
  TORCH_CHECK_VALUE(skip >= 0, "uniform_: skip: expected 0 or more, got ", skip);
}

/// Draws from `generator` as torch does, which counts the words that are left, the one to be drawn next among them.
void draw(at::CPUGeneratorImpl& generator, const FillArgs& args) {
  if (args.skip == 0 && args.count == 0) return;
  at::mt19937 engine = generator.engine();
  at::mt19937_data_pod data = engine.data();
  Mt19937 state{data.state_.data(), kStateWords - (data.left_ - 1)};
  binding::throw_unless_ok(fill_cpu(args, &state));
  data.next_ = static_cast<uint32_t>(state.taken);
  data.left_ = static_cast<int>(kStateWords - state.taken) + 1;
  engine.set_data(data);
  generator.set_engine(engine);
}

void draw_from_default(const FillArgs& args) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  draw(*generator.get<at::CPUGeneratorImpl>(), args);
}

/// Whether this build of torch rounds its numbers as the kernel does; see README.md.
bool torch_rounds_once() {
  static const bool does = [] {
    constexpr int64_t kCount = 1000;  // rounding twice, half of them differ
    constexpr float kBound = 0.3f;
    at::Generator generator = at::detail::createCPUGenerator(1);
    const Tensor torchs = at::empty({kCount}, at::TensorOptions().dtype(at::kFloat).device(at::kCPU));
    at::Tensor(torchs).uniform_(-kBound, kBound, generator);
    generator.set_current_seed(1);
    std::vector<float> ours(kCount);
    draw(*generator.get<at::CPUGeneratorImpl>(), {0, kCount, kBound, ours.data()});
    return std::equal(ours.begin(), ours.end(), torchs.const_data_ptr<float>());
  }();
  return does;
}

/// By torch, after the skipped words.
void uniform_aten(Tensor& out, double bound, int64_t skip) {
  check(out, bound, skip);
  draw_from_default({skip, 0, 0, nullptr});
  out.uniform_(-bound, bound);
}

void uniform(Tensor& out, double bound, int64_t skip) {
  // Below, numbers may be subnormal, of which torch and the kernel make different things.
  constexpr double kSmallest = 0x1p-100;
  const bool has_kernel = out.scalar_type() == at::kFloat && out.is_contiguous() && bound >= kSmallest;
  if (!has_kernel || !torch_rounds_once()) return uniform_aten(out, bound, skip);
  check(out, bound, skip);
  draw_from_default({skip, out.numel(), static_cast<float>(bound), out.mutable_data_ptr<float>()});
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  m.def("uniform_(Tensor(a!) out, float bound, int skip=0) -> ()",
        {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) { m.impl("uniform_", &uniform); }

TORCH_LIBRARY_IMPL(pylora, CompositeExplicitAutograd, m) { m.impl("uniform_", &uniform_aten); }

}  // namespace pylora::uniform
