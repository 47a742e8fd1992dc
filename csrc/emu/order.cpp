// Order between threads: told to TSan, which knows single threads, and kept between blocks by vector clocks, so that
// builds without TSan notice a release or acquire that is missing.
#include <unordered_map>

#include "emu/block.h"

#if defined(PYLORA_EMULATE_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace pylora::emu {
namespace {

/// By block, how many of its releases are known. Empty: none of any.
using Clock = std::vector<uint32_t>;

std::vector<uint32_t> releases;                        // by block
std::vector<Clock> known;                              // by block
std::unordered_map<const void*, Clock> left_by_block;  // by counter

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i)
    into[i] = into[i] < from[i] ? from[i] : into[i];
}

size_t this_block() { return static_cast<size_t>(running_thread().block->linear); }

}  // namespace

void order_release([[maybe_unused]] const void* tag) {
#if defined(PYLORA_EMULATE_TSAN)
  __tsan_release(const_cast<void*>(tag));
#endif
}

void order_acquire([[maybe_unused]] const void* tag) {
#if defined(PYLORA_EMULATE_TSAN)
  __tsan_acquire(const_cast<void*>(tag));
#endif
}

void clear_order(int64_t blocks) {
  releases.assign(static_cast<size_t>(blocks), 0);
  known.assign(static_cast<size_t>(blocks), {});
  left_by_block.clear();
}

uint32_t num_releases(int64_t block) { return releases[static_cast<size_t>(block)]; }

bool is_released(int64_t writer, uint32_t releases_before, int64_t reader) {
  const Clock& clock = known[static_cast<size_t>(reader)];
  const auto index = static_cast<size_t>(writer);
  return index < clock.size() && clock[index] > releases_before;
}

void release_to(const int* counter) {
  const size_t block = this_block();
  Clock& clock = known[block];
  if (clock.empty()) clock.resize(known.size());
  clock[block] = ++releases[block];
  join(left_by_block[counter], clock);
}

void acquire_from(const int* counter) {
  const auto found = left_by_block.find(counter);
  if (found != left_by_block.end()) join(known[this_block()], found->second);
}

}  // namespace pylora::emu
