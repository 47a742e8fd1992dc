#include "emu/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(PYLORA_EMULATE_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

// Saves the registers that the ABI lets a callee keep (System V, x86-64) on the running stack, stores where in *save,
// and takes up what lies at `load`.
extern "C" void pylora_emu_switch(void** save, void* load);
asm(R"(
.text
.globl pylora_emu_switch
.hidden pylora_emu_switch
.type pylora_emu_switch, @function
pylora_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pylora_emu_switch, .-pylora_emu_switch
)");

namespace pylora::emu {
namespace {

constexpr int kSavedRegisters = 6;
constexpr size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__) || defined(PYLORA_EMULATE_TSAN)
constexpr size_t kStackBytes = 256 * 1024;  // instrumented frames are several times larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

void allocate_stack(Fiber& fiber) {
  void* const memory =
      mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) std::abort();
  fiber.stack = static_cast<char*>(memory) + kPage;
  fiber.stack_bytes = kStackBytes;
}

}  // namespace

void prepare(Fiber& fiber, void (*entry)()) {
  if (fiber.stack == nullptr) allocate_stack(fiber);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
#endif
  // The first switch pops the registers and returns into `entry`, which then finds rsp % 16 == 8, as after a call.
  auto** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i)
    *--top = nullptr;
  fiber.stack_pointer = top;
#if defined(PYLORA_EMULATE_TSAN)
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
}

void adopt_running([[maybe_unused]] Fiber& fiber) {
#if defined(PYLORA_EMULATE_TSAN)
  fiber.tsan_fiber = __tsan_get_current_fiber();
#endif
}

void finish_first_switch([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  from.stack = static_cast<char*>(const_cast<void*>(bottom));
  from.stack_bytes = bytes;
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.asan_stack, to.stack, to.stack_bytes);
#endif
#if defined(PYLORA_EMULATE_TSAN)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  pylora_emu_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan_stack, nullptr, nullptr);
#endif
}

void abandon([[maybe_unused]] Fiber& fiber) {
#if defined(PYLORA_EMULATE_TSAN)
  if (fiber.tsan_fiber != nullptr) __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = nullptr;
#endif
}

void free_stack(Fiber& fiber) {
  if (fiber.stack != nullptr) munmap(fiber.stack - kPage, kPage + fiber.stack_bytes);
  fiber.stack = nullptr;
}

}  // namespace pylora::emu
