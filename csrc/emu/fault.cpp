// Shared memory between pages that fault, and the handler that turns such a fault into a trap. In a build with a
// sanitizer both are the sanitizer's business: it knows every byte, and the line.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "emu/block.h"

namespace pylora::emu {
namespace {

constexpr size_t kPage = 4096, kSharedAlignment = 128;
constexpr unsigned char kNanByte = 0xff;

}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(PYLORA_EMULATE_TSAN)

unsigned char* allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlignment, bytes) != 0) std::abort();
  std::memset(memory, kNanByte, bytes);
  return static_cast<unsigned char*>(memory);
}

bool shared_end_is_whole(const unsigned char*, size_t) { return true; }
void free_shared(unsigned char* shared, size_t) { std::free(shared); }

FaultHandler::FaultHandler() {}
FaultHandler::~FaultHandler() {}

#else

namespace {

constexpr size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }
/// Bytes between the end of shared memory and the page that faults: its beginning has to be aligned.
constexpr size_t slack(size_t bytes) { return round_up(bytes, kSharedAlignment) - bytes; }

struct sigaction previous_action;
stack_t previous_stack;
constexpr size_t kSignalStackBytes = 64 * 1024;
alignas(16) char signal_stack[kSignalStackBytes];
uintptr_t fault_address;

/// Runs on the faulting fiber's stack, from its top: the fiber does not go on.
void report_fault() {
  const Thread& thread = running_thread();
  const auto shared = reinterpret_cast<uintptr_t>(thread.block->shared);
  const auto stack = reinterpret_cast<uintptr_t>(thread.fiber.stack);
  const size_t bytes = current_launch->shared_bytes;
  if (fault_address >= stack - kPage && fault_address < stack) trap(thread.site, "stack overflow, after this line");
  if (bytes != 0 && fault_address + kPage >= shared && fault_address < shared + bytes + slack(bytes) + kPage) {
    trap(thread.site, "shared memory: byte %ld of %zu touched, after this line",
         static_cast<long>(fault_address - shared), bytes);
  }
  trap(thread.site, "invalid address %p, after this line", reinterpret_cast<void*>(fault_address));
}

void handle(int, siginfo_t* info, void* erased) {
  if (current_launch == nullptr || current_launch->running == nullptr) {
    sigaction(SIGSEGV, &previous_action, nullptr);  // not a kernel's: faults again, for whoever had the signal before
    return;
  }
  fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
  auto* const context = static_cast<ucontext_t*>(erased);
  const Fiber& fiber = current_launch->running->fiber;
  const auto top = reinterpret_cast<uintptr_t>(fiber.stack + fiber.stack_bytes);
  context->uc_mcontext.gregs[REG_RSP] = static_cast<greg_t>(top - 8);  // rsp % 16 == 8, as after a call
  context->uc_mcontext.gregs[REG_RIP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(&report_fault));
}

}  // namespace

unsigned char* allocate_shared(size_t bytes) {
  const size_t pages = round_up(bytes, kPage);
  void* const memory = mmap(nullptr, pages + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* const usable = static_cast<unsigned char*>(memory) + kPage;
  if (memory == MAP_FAILED || mprotect(usable, pages, PROT_READ | PROT_WRITE) != 0) std::abort();
  std::memset(usable, kNanByte, pages);
  return usable + pages - round_up(bytes, kSharedAlignment);
}

bool shared_end_is_whole(const unsigned char* shared, size_t bytes) {
  const unsigned char* const end = shared + bytes;
  return std::all_of(end, end + slack(bytes), [](unsigned char byte) { return byte == kNanByte; });
}

void free_shared(unsigned char* shared, size_t bytes) {
  if (shared == nullptr) return;
  const size_t pages = round_up(bytes, kPage);
  munmap(shared + round_up(bytes, kSharedAlignment) - pages - kPage, pages + 2 * kPage);
}

FaultHandler::FaultHandler() {
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = kSignalStackBytes;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action = {};
  action.sa_sigaction = &handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_action);
}

FaultHandler::~FaultHandler() {
  sigaction(SIGSEGV, &previous_action, nullptr);
  sigaltstack(&previous_stack, nullptr);
}

#endif

}  // namespace pylora::emu
