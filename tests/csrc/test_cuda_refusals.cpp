// What a GPU's refusal is said to be, by made-up answers of the runtime: no GPU is needed.
#include <cassert>
#include <cstdio>
#include <string>

#include "cuda/refusals.h"

using pylora::cuda::explain;
using pylora::cuda::kept;
using pylora::cuda::LaunchFacts;
using pylora::cuda::Refusal;

namespace {

void expect(const std::string& got, const std::string& wanted) {
  if (got != wanted) std::fprintf(stderr, "expected %s\ngot      %s\n", wanted.c_str(), got.c_str());
  assert(got == wanted);
}

LaunchFacts facts_of_a_device() {
  LaunchFacts facts;
  facts.said = "what CUDA says";
  facts.built_for = "80, 90";
  facts.major = 7;
  facts.minor = 5;
  facts.shared_bytes = 70000;
  facts.max_shared_bytes = 65536;
  facts.runtime_version = 13000;
  facts.driver_version = 12040;
  return facts;
}

void test_each_refusal_says_which() {
  LaunchFacts facts = facts_of_a_device();
  expect(explain(Refusal::no_driver, facts),
         "driver: expected one that runs CUDA 13.0, got one for CUDA 12.4 (what CUDA says)");
  facts.driver_version = 0;
  expect(explain(Refusal::no_driver, facts), "driver: expected one that runs CUDA 13.0, got none (what CUDA says)");
  expect(explain(Refusal::no_device, facts), "device: expected a GPU, got none (what CUDA says)");
  expect(explain(Refusal::no_code, facts),
         "architecture: expected a GPU that pylora was built for (80, 90, or newer), got sm_75; build it with "
         "PYLORA_CUDA_ARCHS=75");
  expect(explain(Refusal::shared_memory, facts),
         "shared memory: expected at most 65536 bytes a block on this sm_75, got 70000");
  expect(explain(Refusal::other, facts), "what CUDA says");
}

void test_a_kept_text_stays() {
  const char* first = kept(std::string("one"));
  const char* second = kept(std::string("two"));
  expect(first, "one");
  expect(second, "two");
  assert(kept(std::string("one")) == first);
}

}  // namespace

int main() {
  test_each_refusal_says_which();
  test_a_kept_text_stays();
  return 0;
}
