// The generator's published known answers, and that dropout's layout uses each half word of each counter exactly
// once.
#include "common/philox.h"

#include <set>
#include <tuple>

#include "check.h"

using pylora::philox4x32;
using pylora::PhiloxWords;

static void check_answer(PhiloxWords counter, uint64_t seed, PhiloxWords expected) {
  const PhiloxWords got = philox4x32(counter, seed);
  for (int i = 0; i < 4; ++i)
    CHECK(got.word[i] == expected.word[i], "word %d: %08x", i, got.word[i]);
}

int main() {
  // Random123's kat_vectors for philox4x32-10.
  check_answer({{0, 0, 0, 0}}, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check_answer({{~0u, ~0u, ~0u, ~0u}}, ~uint64_t{0}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check_answer({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822,
               {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});

  std::set<std::tuple<int, int, int>> places;
  for (int column = 0; column < 256; ++column) {
    const int inner = column % 64, v = inner / 8;
    places.insert({8 * (column / 64) + inner % 8, v / 2, v % 2});
  }
  CHECK(places.size() == 256, "%zu distinct places", places.size());

  CHECK(!pylora::make_dropout(0.0, nullptr).active(), "p = 0 drops nothing");
  CHECK(pylora::make_dropout(1.0, nullptr).keep_scale == 0.0, "p = 1 keeps nothing");
  CHECK(pylora::make_dropout(0.5, nullptr).keep_scale == 2.0, "p = 0.5 doubles what it keeps");
  return pylora::test::failures() == 0 ? 0 : 1;
}
