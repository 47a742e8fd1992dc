// The merge launchers on several threads and from several callers: the bits of one thread, in W and in the log.
#include "merge/heuristics.h"
#include "merge/merge.h"
#include "threads.h"

using namespace pylora;
using namespace pylora::merge;
using test::AlignedBuffer;
using test::append;
using test::Bytes;
using test::random_elements;

namespace {

constexpr int64_t kRows = 61, kColumns = 1001, kRank = 6;

/// A weight of its own with an adapter, and a log with room for everything.
struct Case {
  Bytes w, a = random_elements(DType::f32, kRank* kColumns, 2), b = random_elements(DType::f32, kRows* kRank, 3);
  Bytes data;
  std::vector<ChunkHeader> chunks;
  Adapter adapter;
  Log log;
  ChangeArgs args;
  AlignedBuffer workspace{1};

  Case(DType dtype, int64_t threads) : w(random_elements(dtype, kRows * kColumns, 1)) {
    adapter.rank = kRank;
    adapter.a = {a.data(), kColumns, 1};
    adapter.b = {b.data(), kRank, 1};
    adapter.scaling = 0.03;
    args.weight.rows = kRows;
    args.weight.columns = args.weight.row_stride = kColumns;
    args.weight.dtype = dtype;
    args.weight.data = w.data();
    args.num_slots = threads;
    chunks.resize(static_cast<size_t>(num_chunks(args.weight)));
    for (ChunkHeader& each : chunks)
      each.set(ChunkKind::pending);
    data.resize(w.size() + static_cast<size_t>(panel_log_bytes(args.weight)));
    log.chunks = chunks.data();
    log.data = data.data();
    log.capacity = static_cast<int64_t>(data.size());
    args.put_in = args.take_out = {&adapter, 1};
    workspace = AlignedBuffer(workspace_bytes(args));
    args.workspace = workspace.data.get();
  }

  void put_in(const Context& context) {
    args.put_in = {&adapter, 1};
    args.take_out = {};
    args.read = nullptr;
    args.write = &log;
    args.unchanged = nullptr;
    CHECK(change_cpu(context, args).is_ok(), "put in");
  }

  bool take_out(const Context& context) {
    bool unchanged = false;
    args.put_in = {};
    args.take_out = {&adapter, 1};
    args.read = &log;
    args.write = nullptr;
    args.unchanged = &unchanged;
    CHECK(change_cpu(context, args).is_ok(), "take out");
    return unchanged;
  }

  /// Headers and payloads in chunk order.
  Bytes ordered_log() const {
    std::vector<ChunkHeader> headers(chunks.size());
    Bytes payloads(data.size());
    Log copy;
    copy.chunks = headers.data();
    copy.data = payloads.data();
    copy_log(args.weight, log, &copy);
    payloads.resize(static_cast<size_t>(copy.used));
    for (const ChunkHeader& each : headers) {
      const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&each);
      append(&payloads, Bytes(bytes, bytes + sizeof each));
    }
    return payloads;
  }
};

/// W and the log after a merge, W after an unmerge that is refused, and W after one that is not.
Bytes cycle(const Context& context, DType dtype, int64_t threads) {
  Case c(dtype, threads);
  const Bytes before = c.w;
  c.put_in(context);
  Bytes all = c.w;
  append(&all, c.ordered_log());
  CHECK(c.w != before, "the weight is changed");
  c.w.back() ^= 1;  // in the last panel: others have been taken out when it is met
  const Bytes edited = c.w;
  CHECK(!c.take_out(context), "the edit is seen");
  CHECK(c.w == edited, "a weight that is refused is as it was");
  c.w.back() ^= 1;
  CHECK(c.take_out(context), "taken out");
  CHECK(c.w == before, "the weight comes back");
  append(&all, c.w);
  return all;
}

}  // namespace

int main() {
  test::with_each_isa([] {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      test::check_threads("merge", [dtype](const Context& context) { return cycle(context, dtype, 3); });
      CHECK(cycle(test::thread_context<7>(), dtype, 7) == cycle(Context{}, dtype, 1), "seven threads");
    }
  });
  return test::failures() == 0 ? 0 : 1;
}
