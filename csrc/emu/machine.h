// The emulated device as a host sees it: its settings, which memory kernels may touch, and what launches have done.
// One a process, for one thread of the host at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pylora::emu {

/// The order in which the threads that can run get their turn. From 2 on it is a random one's seed.
constexpr uint64_t kForward = 0, kReverse = 1;

struct Config {
  uint64_t order = kForward;
  int resident_blocks = 4;  // that interleave
  int multiprocessors = 4;
  size_t max_shared_bytes = 99 * 1024;  // sm_86 and sm_89 have the least
  bool check_regions = true;            // off, a sanitizer alone judges addresses
};

/// Memory that kernels may touch. Where there are no regions, addresses go unchecked.
struct Region {
  uintptr_t begin = 0, end = 0;
  bool writable = false;
};

/// What a launch did. Bytes are those that threads asked for (uniform loads once a warp), sectors the distinct 32-byte
/// ones among them.
struct LaunchRecord {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
  int64_t load_bytes = 0, store_bytes = 0;
  int64_t load_sectors = 0, store_sectors = 0;
  int64_t atomics = 0, mma = 0, ldmatrix = 0, cp_async = 0, barriers = 0, spins = 0;
  std::string error;  // of the trap that ended it
};

struct Machine {
  Config config;
  std::vector<Region> regions;
  std::vector<LaunchRecord> launches;
};

Machine& machine();

}  // namespace pylora::emu
