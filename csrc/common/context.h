// How a launcher reaches its caller's threads or stream: a framework fills this in, an engine without one uses the
// default.
#pragma once

#include <cstdint>

namespace pylora {

using RangeBody = void (*)(void* body, int64_t begin, int64_t end);

struct Context {
  /// Calls body(begin, end) on ranges that cover [0, count), each of at least `grain` where count allows it; returns
  /// when all are done.
  void (*run_ranges)(int64_t count, int64_t grain, RangeBody call,
                     void* body) = [](int64_t count, int64_t, RangeBody call, void* body) { call(body, 0, count); };
  /// cudaStream_t of CUDA launchers; unused on the CPU.
  void* stream = nullptr;
};

template <class Body>
void parallel_for(const Context& context, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  context.run_ranges(
      count, grain < 1 ? 1 : grain,
      [](void* erased, int64_t begin, int64_t end) { (*static_cast<const Body*>(erased))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace pylora
