// The merge launchers as an engine without torch calls them: every instruction set, and a log with too little room.
#include "merge/merge.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "inputs.h"
#include "merge/heuristics.h"

using namespace pylora;
using namespace pylora::merge;

namespace {

/// A bf16 weight of `rows` x `columns` with an adapter, and a log of any capacity.
struct Case {
  std::vector<uint16_t> w;
  std::vector<float> a, b;
  Adapter adapter;
  ChangeArgs args;
  std::vector<ChunkHeader> chunks;
  std::vector<uint8_t> data;
  Log log;
  test::AlignedBuffer workspace{1};

  Case(int64_t rows, int64_t columns, bool transposed, float share) {
    constexpr int64_t kRank = 5;
    std::mt19937 generator(static_cast<unsigned>(rows * 31 + columns));
    std::normal_distribution<float> normal;
    w.resize(static_cast<size_t>(rows * columns));
    for (uint16_t& each : w) {
      const float value = normal(generator);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      each = static_cast<uint16_t>(bits >> 16);
    }
    for (size_t i = 0; i < w.size(); i += 7)
      w[i] = static_cast<uint16_t>(generator());  // NaNs, infinities, subnormals
    const int64_t in = transposed ? rows : columns, out = transposed ? columns : rows;
    a.resize(static_cast<size_t>(kRank * in));
    b.resize(static_cast<size_t>(out * kRank));
    for (float& each : a)
      each = normal(generator);
    for (float& each : b)
      each = share * normal(generator);
    adapter.rank = kRank;
    adapter.a = {a.data(), in, 1};
    adapter.b = {b.data(), kRank, 1};
    adapter.scaling = 0.75;
    args.weight.rows = rows;
    args.weight.columns = args.weight.row_stride = columns;
    args.weight.transposed = transposed;
    args.weight.dtype = DType::bf16;
    args.weight.data = w.data();
    args.put_in = {&adapter, 1};
    args.num_slots = 2;
    workspace = test::AlignedBuffer(workspace_bytes(args));
    args.workspace = workspace.data.get();
    chunks.resize(static_cast<size_t>(num_chunks(args.weight)));
    for (ChunkHeader& each : chunks)
      each.set(ChunkKind::pending);
    log.chunks = chunks.data();
  }

  void make_room(int64_t bytes) {
    data.resize(static_cast<size_t>(bytes));
    log.data = data.data();
    log.capacity = bytes;
  }

  int64_t pending() const {
    int64_t count = 0;
    for (const ChunkHeader& each : chunks)
      count += each.is(ChunkKind::pending);
    return count;
  }

  Status put_in() {
    args.put_in = {&adapter, 1};
    args.take_out = {};
    args.read = nullptr;
    args.write = &log;
    return change_cpu(Context{}, args);
  }
  Status take_out() {
    args.put_in = {};
    args.take_out = {&adapter, 1};
    args.read = &log;
    args.write = nullptr;
    return change_cpu(Context{}, args);
  }
};

void check_round_trip(int64_t rows, int64_t columns, bool transposed, float share) {
  Case c(rows, columns, transposed, share);
  const std::vector<uint16_t> before = c.w;
  c.make_room(first_log_capacity(c.args.weight) + rows * columns * 2);
  CHECK(c.put_in().is_ok(), "put in");
  CHECK(c.pending() == 0, "all chunks have room");
  CHECK(c.w != before || rows * columns < 100, "%lld x %lld is changed", static_cast<long long>(rows),
        static_cast<long long>(columns));
  CHECK(is_readable(c.args.weight, c.log), "the log is readable");
  bool unchanged = false;
  CHECK(check_unchanged_cpu(Context{}, c.args.weight, c.log, &unchanged).is_ok() && unchanged, "checksums fit");
  c.w.back() ^= 1;
  CHECK(check_unchanged_cpu(Context{}, c.args.weight, c.log, &unchanged).is_ok() && !unchanged, "an edit is seen");
  c.w.back() ^= 1;
  CHECK(c.take_out().is_ok(), "take out");
  CHECK(c.w == before, "%lld x %lld comes back", static_cast<long long>(rows), static_cast<long long>(columns));
}

/// Room for part of the panels: the others stay as they were, and either direction goes on from there.
void check_little_room() {
  for (const bool go_on : {false, true}) {
    Case c(300, 1000, false, 1.0f);
    const std::vector<uint16_t> before = c.w;
    c.make_room(90000);
    CHECK(c.put_in().is_ok(), "put in");
    const int64_t pending = c.pending(), all = static_cast<int64_t>(c.chunks.size());
    CHECK(pending > 0 && pending < all, "%lld of %lld pending", static_cast<long long>(pending),
          static_cast<long long>(all));
    const int64_t last = (all - 1) * kChunk;
    CHECK(std::memcmp(&c.w[static_cast<size_t>(last)], &before[static_cast<size_t>(last)],
                      (c.w.size() - static_cast<size_t>(last)) * 2) == 0,
          "a pending chunk is as it was");
    if (go_on) {
      c.make_room(c.log.used + 300 * 1000 * 2);
      CHECK(c.put_in().is_ok() && c.pending() == 0, "the rest finds room");
    }
    CHECK(c.take_out().is_ok(), "take out");
    CHECK(c.w == before, "the weight is whole");
  }
}

void check_other_arithmetic() {
  for (Isa there : kAllIsas) {
    for (Isa back : kAllIsas) {
      if (!isa_built(there) || !isa_supported(there) || !isa_built(back) || !isa_supported(back)) continue;
      Case c(40, 300, false, 0.5f);
      const std::vector<uint16_t> before = c.w;
      c.make_room(first_log_capacity(c.args.weight) + 40 * 300 * 2);
      CHECK(set_isa(isa_name(there)).is_ok() && c.put_in().is_ok(), "put in with %s", isa_name(there));
      CHECK(set_isa(isa_name(back)).is_ok() && c.take_out().is_ok(), "take out with %s", isa_name(back));
      CHECK(c.w == before, "%s to %s", isa_name(there), isa_name(back));
    }
  }
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
    for (const float share : {0.01f, 0.3f, 30.0f})
      for (const bool transposed : {false, true})
        for (int64_t rows : {1, 3, 13, 100})
          for (int64_t columns : {1, 7, 33, 130, 4099})
            check_round_trip(rows, columns, transposed, share);
    check_little_room();
  }
  check_other_arithmetic();
  Case rankless(4, 4, false, 1.0f);
  rankless.adapter.rank = 0;
  CHECK(!rankless.put_in().is_ok(), "rank 0 is refused");
  ChangeArgs nothing;
  CHECK(!change_cpu(Context{}, nothing).is_ok(), "no adapters are refused");
  return test::failures() == 0 ? 0 : 1;
}
