// The uniform launcher against the standard library's MT19937, on every instruction set.
#include "uniform/uniform.h"

#include <random>
#include <vector>

#include "check.h"
#include "threads.h"

using namespace pylora;
using uniform::kStateWords;

namespace {

/// What std::mt19937 starts from for `seed`; its first block is still to be made.
std::vector<uint32_t> start_of(uint32_t seed) {
  std::vector<uint32_t> words(kStateWords);
  words[0] = seed;
  for (size_t i = 1; i < words.size(); ++i)
    words[i] = 1812433253u * (words[i - 1] ^ (words[i - 1] >> 30)) + static_cast<uint32_t>(i);
  return words;
}

void check(int64_t skip, int64_t count, float bound) {
  std::vector<uint32_t> words = start_of(5489);
  uniform::Mt19937 state{words.data(), kStateWords};
  std::mt19937 expected(5489);
  for (int round = 0; round < 3; ++round) {  // goes on where the last one stopped
    std::vector<float> out(static_cast<size_t>(count), 7);
    CHECK(uniform::fill_cpu({skip, count, bound, out.data()}, &state).is_ok(), "fill");
    expected.discard(static_cast<unsigned long long>(skip));
    for (int64_t i = 0; i < count; ++i) {
      const double u = static_cast<double>(expected() & 0xffffff) / 0x1000000;
      const float number = static_cast<float>((2 * u - 1) * static_cast<double>(bound));
      CHECK(out[static_cast<size_t>(i)] == number, "skip %ld: number %ld of %ld", long(skip), long(i), long(count));
    }
  }
  CHECK(state.taken == (3 * (skip + count) - 1) % kStateWords + 1, "%ld taken", long(state.taken));
}

}  // namespace

int main() {
  test::with_each_isa([] {
    for (int64_t skip : {0, 1, 623, 624, 625, 3000})
      for (int64_t count : {1, 13, 624, 1000})
        check(skip, count, 0.3f);
    check(5, 2000, 0);
    check(5, 2000, 1e30f);
  });
  std::vector<uint32_t> words = start_of(1), before = words;
  uniform::Mt19937 state{words.data(), 600};
  CHECK(uniform::fill_cpu({0, 0, 1, nullptr}, &state).is_ok() && words == before && state.taken == 600, "no words");
  CHECK(!uniform::fill_cpu({-1, 0, 1, nullptr}, &state).is_ok(), "negative skip");
  CHECK(!uniform::fill_cpu({0, -1, 1, nullptr}, &state).is_ok(), "negative count");
  state.taken = 625;
  CHECK(!uniform::fill_cpu({0, 0, 1, nullptr}, &state).is_ok(), "a state that cannot be");
  return test::failures() == 0 ? 0 : 1;
}
