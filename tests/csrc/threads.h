// What the test_threads_*.cpp programs share: a Context over std::thread, and a launcher held to the bits that it gives
// on one thread. `make sanitize` runs them under ThreadSanitizer, which torch's OpenMP threads would blind.
#pragma once

#include <thread>
#include <vector>

#include "check.h"
#include "common/context.h"
#include "cpu/isa.h"
#include "inputs.h"

namespace pylora::test {

/// Shares [0, count) among up to kThreads threads, the caller's among them. The grain is ignored, so that small shapes
/// are split as well.
template <int kThreads>
Context thread_context() {
  Context context;
  context.run_ranges = [](int64_t count, int64_t, RangeBody call, void* body) {
    const int64_t share = (count + kThreads - 1) / kThreads;
    std::vector<std::thread> threads;
    for (int64_t begin = share; begin < count; begin += share)
      threads.emplace_back(call, body, begin, begin + share < count ? begin + share : count);
    call(body, 0, share < count ? share : count);
    for (std::thread& thread : threads)
      thread.join();
  };
  return context;
}

/// `run(context)` calls a launcher with buffers of its own for all that it writes, and returns the bytes of its results.
/// They have to be the same from one thread, from several, and from several callers at once that read the same inputs.
template <class Run>
void check_threads(const char* what, const Run& run) {
  const Bytes expected = run(Context{});
  CHECK(run(thread_context<2>()) == expected, "%s: two threads", what);
  CHECK(run(thread_context<3>()) == expected, "%s: three threads", what);
  constexpr int kCallers = 3;
  Bytes results[kCallers];
  std::vector<std::thread> callers;
  for (Bytes& result : results)
    callers.emplace_back([&run, &result] { result = run(thread_context<2>()); });
  for (std::thread& caller : callers)
    caller.join();
  for (int i = 0; i < kCallers; ++i)
    CHECK(results[i] == expected, "%s: caller %d of %d", what, i, kCallers);
}

/// Calls `body` with every instruction set that is built and that this CPU has, in use.
template <class Body>
void with_each_isa(const Body& body) {
  for (Isa isa : kAllIsas) {
    if (!isa_built(isa)) continue;
    if (!isa_supported(isa)) {
      std::printf("skipped: this CPU has no %s\n", isa_name(isa));
      continue;
    }
    CHECK(set_isa(isa_name(isa)).is_ok(), "%s", isa_name(isa));
    body();
  }
}

inline void append(Bytes* all, const Bytes& more) { all->insert(all->end(), more.begin(), more.end()); }

}  // namespace pylora::test
