// Runs a launch: takes blocks up as others retire, gives every thread that can run its turn, and notices when none can.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <memory>
#include <random>
#include <string>

#include "emu/block.h"

namespace pylora::emu {

Launch* current_launch = nullptr;

Machine& machine() {
  static Machine instance;
  return instance;
}

const Dim3& thread_index() { return running_thread().index; }
const Dim3& block_index() { return running_thread().block->index; }
const Dim3& block_size() { return current_launch->block_size; }
const Dim3& grid_size() { return current_launch->grid; }
unsigned char* shared_memory() { return running_thread().block->shared; }
int num_multiprocessors() { return machine().config.multiprocessors; }
size_t max_shared_bytes() { return machine().config.max_shared_bytes; }

namespace {

/// Passes over all resident blocks in which nothing but spinning happened, before it is called a livelock.
constexpr int kMostIdlePasses = 1000;
/// In random order a block gives way after one turn in so many.
constexpr int kTurnsPerBlock = 64;

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

/// file:line, the file from the repository's root on.
std::string place(Site site) {
  const std::string file = site.file;
  size_t begin = file.rfind("csrc/");
  if (begin == std::string::npos) begin = file.rfind("tests/");
  return text("%s:%d", file.c_str() + (begin == std::string::npos ? 0 : begin), site.line);
}

/// "[with auto kernel = pylora::lora::dropout_kernel<float>; Args = ..." to the kernel's name.
std::string kernel_name(const std::string& signature) {
  const std::string before = "kernel = ";
  const size_t begin = signature.find(before);
  if (begin == std::string::npos) return signature;
  const size_t end = std::min(signature.find(';', begin), signature.find(", Args", begin));
  return signature.substr(begin + before.size(), end - begin - before.size());
}

/// A Status has to point to text that lives as long as the process.
Status status_of(const std::string& error) {
  static std::deque<std::string> messages;
  messages.push_back(error);
  return {Status::Code::cuda_error, messages.back().c_str()};
}

[[noreturn]] void thread_entry() {
  Launch& launch = *current_launch;
  finish_first_switch(launch.scheduler);
  order_acquire(&launch.start);
  launch.body(launch.argument);
  Thread& thread = running_thread();
  if (thread.num_copies != 0)
    trap(thread.site, "exited with %d cp.async copies that it never waited for", thread.num_copies);
  order_release(&launch.end);
  thread.state = State::done;
  --thread.block->alive;
  switch_fiber(thread.fiber, launch.scheduler, true);
  __builtin_unreachable();
}

/// Threads of a block that wait, as "threads 0-31 wait in __syncthreads at a.cu:12; threads 32-63 have exited".
std::string waiting_threads(const Block& block) {
  std::string report;
  const auto same = [](const Thread& a, const Thread& b) {
    return a.state == b.state && (a.state == State::done || (a.doing == b.doing && a.site.line == b.site.line));
  };
  constexpr size_t kMostText = 400;
  for (size_t i = 0, next = 0; i < block.threads.size() && report.size() < kMostText; i = next) {
    const Thread& first = block.threads[i];
    while (next < block.threads.size() && same(first, block.threads[next]))
      ++next;
    report += text("%sthreads %zu-%zu ", i == 0 ? "" : "; ", i, next - 1);
    report += first.state == State::done ? "have exited" : text("wait in %s at ", first.doing) + place(first.site);
  }
  return report;
}

class Scheduler {
 public:
  explicit Scheduler(Launch& launch) : launch_(launch), config_(machine().config), random_(config_.order) {
    const auto& size = launch.block_size;
    num_threads_ = static_cast<int>(size.x * size.y * size.z);
    order_.resize(static_cast<size_t>(num_threads_));
    for (int i = 0; i < num_threads_; ++i)
      order_[static_cast<size_t>(i)] = config_.order == kReverse ? num_threads_ - 1 - i : i;
  }

  void run() {
    const int64_t total = launch_.record.blocks;
    const auto slots = static_cast<size_t>(std::min<int64_t>(std::max(config_.resident_blocks, 1), total));
    while (blocks_.size() < slots)
      blocks_.push_back(std::make_unique<Block>());
    adopt_running(launch_.scheduler);
    order_release(&launch_.start);
    int idle = 0;
    for (int64_t done = 0; done < total && ok();) {
      bool progress = false;
      if (random_order()) std::shuffle(blocks_.begin(), blocks_.end(), random_);
      for (auto& block : blocks_) {
        if (!block->busy && next_ < total) start(*block);
        if (!block->busy) continue;
        progress |= pass(*block);
        if (!ok()) break;
        if (block->alive == 0) {
          retire(*block);
          ++done;
          progress = true;
        }
      }
      idle = progress ? 0 : idle + 1;
      if (idle > kMostIdlePasses && ok()) fail_idle();
    }
    order_acquire(&launch_.end);
    for (auto& block : blocks_)
      free_block(*block);
    for (auto& [shared, threads] : kept_) {
      free_shared(shared, launch_.shared_bytes);
      for (Thread& thread : threads)
        free_stack(thread.fiber);
    }
  }

 private:
  bool ok() const { return launch_.record.error.empty(); }
  bool random_order() const { return config_.order > kReverse; }

  void start(Block& block) {
    const Dim3& grid = launch_.grid;
    block.linear = next_;
    block.index = Dim3(static_cast<unsigned>(next_ % grid.x), static_cast<unsigned>(next_ / grid.x % grid.y),
                       static_cast<unsigned>(next_ / (static_cast<int64_t>(grid.x) * grid.y)));
    ++next_;
    block.alive = num_threads_;
    block.busy = true;
    for (size_t i = static_cast<size_t>(num_threads_); i < block.threads.size(); ++i)
      free_stack(block.threads[i].fiber);
    block.threads.resize(static_cast<size_t>(num_threads_));
    block.warps.assign(static_cast<size_t>((num_threads_ + kLanes - 1) / kLanes), Warp{});
    for (Barrier& barrier : block.barriers)
      barrier = Barrier{};
    block.shared = launch_.shared_bytes != 0 ? allocate_shared(launch_.shared_bytes) : nullptr;
    const auto& size = launch_.block_size;
    for (int i = 0; i < num_threads_; ++i) {
      Thread& thread = block.threads[static_cast<size_t>(i)];
      const auto linear = static_cast<unsigned>(i);
      thread.index = Dim3(linear % size.x, linear / size.x % size.y, linear / (size.x * size.y));
      thread.linear = i;
      thread.block = &block;
      thread.state = State::ready;
      thread.site = Site{};
      thread.num_copies = thread.copy_group = 0;
      prepare(thread.fiber, &thread_entry);
    }
  }

  /// A turn for each thread that can run; returns whether one of them did more than spin.
  bool pass(Block& block) {
    if (random_order()) std::shuffle(order_.begin(), order_.end(), random_);
    bool ran = false, progress = false;
    for (const int i : order_) {
      Thread& thread = block.threads[static_cast<size_t>(i)];
      if (thread.state != State::ready) continue;
      ran = true;
      launch_.running = &thread;
      launch_.gave_way = launch_.spun = false;
      switch_fiber(launch_.scheduler, thread.fiber);
      launch_.running = nullptr;
      progress |= !launch_.spun;
      if (!ok() || launch_.gave_way) return true;
      if (random_order() && random_() % kTurnsPerBlock == 0) return progress;
    }
    if (!ran && block.alive != 0) {
      fail(&block.threads[0], Site{}, ("deadlock: " + waiting_threads(block)).c_str());
    }
    return progress;
  }

  void retire(Block& block) {
    if (launch_.shared_bytes != 0 && !shared_end_is_whole(block.shared, launch_.shared_bytes)) {
      fail(&block.threads[0], Site{}, text("wrote past the %zu bytes of shared memory", launch_.shared_bytes).c_str());
    }
    free_block(block);
  }

  void free_block(Block& block) {
    if (!block.busy) return;
    block.busy = false;
    for (Thread& thread : block.threads)
      abandon(thread.fiber);
#if defined(PYLORA_EMULATE_TSAN)
    // TSan knows no order between this block and the next: memory that passed from one to the other would look like a
    // race, and is kept until the launch is over.
    kept_.emplace_back(block.shared, std::move(block.threads));
    block.threads.clear();
#else
    free_shared(block.shared, launch_.shared_bytes);
#endif
    block.shared = nullptr;
  }

  void fail_idle() {
    for (auto& block : blocks_) {
      if (!block->busy) continue;
      for (const Thread& thread : block->threads) {
        if (thread.state != State::ready) continue;
        fail(&thread, thread.site, "livelock: every thread that can run spins");
        return;
      }
    }
  }

  Launch& launch_;
  const Config& config_;
  std::mt19937_64 random_;
  int num_threads_ = 0;
  int64_t next_ = 0;
  std::vector<int> order_;
  std::vector<std::pair<unsigned char*, std::vector<Thread>>> kept_;
  /// Blocks and with them their threads' stacks outlive a launch.
  static std::vector<std::unique_ptr<Block>> blocks_;
};

std::vector<std::unique_ptr<Block>> Scheduler::blocks_;

std::string invalid_launch(Dim3 grid, Dim3 block, size_t shared_bytes) {
  const Config& config = machine().config;
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMostThreads)
    return text("block: expected 1 to %d threads, got %ld", kMostThreads, threads);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) {
    return text("grid: expected 1 to 2^31 - 1, 65535, 65535 blocks, got %u, %u, %u", grid.x, grid.y, grid.z);
  }
#if defined(PYLORA_EMULATE_TSAN)
  // TSan knows 8128 threads, the process's own among them, and every one keeps its stack until the launch is over.
  constexpr int64_t kMostTsanThreads = 6000;
  const int64_t all = threads * grid.x * grid.y * grid.z;
  if (all > kMostTsanThreads)
    return text("under TSan: expected at most %ld threads in all, got %ld", kMostTsanThreads, all);
#endif
  if (shared_bytes > config.max_shared_bytes) {
    return text("shared memory: expected at most %zu bytes, got %zu", config.max_shared_bytes, shared_bytes);
  }
  return {};
}

}  // namespace

void fail(const Thread* thread, Site site, const char* message) {
  LaunchRecord& record = current_launch->record;
  if (!record.error.empty()) return;
  const Dim3 &block = thread->block->index, &index = thread->index;
  record.error = record.kernel +
                 text(": block (%u,%u,%u) thread (%u,%u,%u)", block.x, block.y, block.z, index.x, index.y, index.z);
  if (site.line != 0) record.error += " at " + place(site);
  record.error += ": " + std::string(message);
}

void trap(Site site, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  Thread& thread = running_thread();
  fail(&thread, site, message);
  order_release(&current_launch->end);
  switch_fiber(thread.fiber, current_launch->scheduler, true);
  __builtin_unreachable();
}

void yield(State state) {
  Thread& thread = running_thread();
  thread.state = state;
  switch_fiber(thread.fiber, current_launch->scheduler);
}

void give_way(Site site) {
  running_thread().site = site;
  current_launch->gave_way = true;
  yield(State::ready);
}

void spin_wait(Site site) {
  running_thread().site = site;
  ++current_launch->record.spins;
  current_launch->spun = true;
  yield(State::ready);
}

Status launch(const char* signature, Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
  Launch launch;
  launch.grid = grid;
  launch.block_size = block;
  launch.shared_bytes = shared_bytes;
  launch.body = body;
  launch.argument = argument;
  LaunchRecord& record = launch.record;
  record.kernel = kernel_name(signature);
  record.blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  record.threads = static_cast<int>(block.x * block.y * block.z);
  record.shared_bytes = static_cast<int64_t>(shared_bytes);
  if (const std::string wrong = invalid_launch(grid, block, shared_bytes); !wrong.empty()) {
    record.error = record.kernel + ": " + wrong;
  } else {
    const FaultHandler handler;
    current_launch = &launch;
    clear_shadows();
    clear_order(record.blocks);
    Scheduler(launch).run();
    count_sectors(record);
    current_launch = nullptr;
  }
  machine().launches.push_back(record);
  return record.error.empty() ? Status{} : status_of(record.error);
}

}  // namespace pylora::emu
