// Threads, warps and blocks as the emulator runs them. Inside csrc/emu only.
#pragma once

#include <cstdint>
#include <vector>

#include "emu/device.h"
#include "emu/fiber.h"
#include "emu/machine.h"

namespace pylora::emu {

constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;
constexpr int kBarriers = 16;
constexpr int kMostCopies = 256;  // of a thread that are under way; kernels have a few dozen

enum class State : uint8_t { ready, waits_barrier, waits_warp, done };

struct Barrier;
struct Block;

struct Thread {
  Dim3 index;
  int linear = 0;
  Block* block = nullptr;
  State state = State::done;
  Site site;                         // of the last call that the emulator has seen
  const char* doing = "";            // what it waits in
  const Barrier* barrier = nullptr;  // that it waits at
  Fiber fiber;
  Copy copies[kMostCopies];
  int num_copies = 0;
  int copy_group = 0;
};

enum class WarpOp : uint8_t { sync, shuffle, ballot, mma, ldmatrix };

/// A collective that some lanes have reached and others have not.
struct Gathering {
  uint32_t lanes = 0, arrived = 0;
  WarpOp op = WarpOp::sync;
  Site site;
};

/// How often each lane has run a uniform load, by its place in the source.
struct UniformLoad {
  Site site;
  const void* address = nullptr;
  int most = 0;
  int count[kLanes] = {};
};

constexpr int kMostUniformLoads = 64;

struct Warp {
  Gathering gatherings[kLanes];
  uint32_t in[kLanes][10];
  uint32_t out[kLanes][4];
  UniformLoad uniform[kMostUniformLoads];
  int num_uniform = 0;
};

struct Barrier {
  int expected = 0, arrived = 0;
  Site site;
  unsigned round = 0;
  char tags[2] = {};  // of even and odd rounds, for order_release and order_acquire
};

struct Block {
  Dim3 index;
  int64_t linear = 0;
  int alive = 0;
  bool busy = false;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  unsigned char* shared = nullptr;
};

/// The launch under way.
struct Launch {
  Dim3 grid, block_size;
  size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  LaunchRecord record;
  Fiber scheduler;
  Thread* running = nullptr;
  bool gave_way = false, spun = false;
  char start = 0, end = 0;  // tags: a kernel begins after what the host did and ends before what it does next
};

extern Launch* current_launch;

inline Thread& running_thread() { return *current_launch->running; }
inline Warp& running_warp() {
  Thread& thread = running_thread();
  return thread.block->warps[static_cast<size_t>(thread.linear / kLanes)];
}
inline int running_lane() { return running_thread().linear % kLanes; }

/// Hands over to the scheduler, in `state`.
void yield(State state);
/// As trap(), for threads that wait and cannot say it themselves; returns.
void fail(const Thread* thread, Site site, const char* message);

/// What TSan is told of an order between threads; nothing in other builds.
void order_release(const void* tag);
void order_acquire(const void* tag);

/// Which blocks' writes which others may rely on: order.cpp.
void clear_order(int64_t blocks);
/// How often the block has released. A write is covered by the release after it.
uint32_t num_releases(int64_t block);
/// Whether `reader` has acquired a release of `writer` that came after the first `releases` ones.
bool is_released(int64_t writer, uint32_t releases, int64_t reader);

/// Counters and shadows of memory.cpp: cleared before a launch, read into its record after it.
void clear_shadows();
void count_sectors(LaunchRecord& record);

/// Shared memory of `bytes` bytes between pages that fault, or in the sanitizer's heap. Filled with NaN.
unsigned char* allocate_shared(size_t bytes);
/// Whether nothing was written between the memory's end and the page's.
bool shared_end_is_whole(const unsigned char* shared, size_t bytes);
void free_shared(unsigned char* shared, size_t bytes);

/// While one exists, a fault in a fiber becomes a trap.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;
};

}  // namespace pylora::emu
