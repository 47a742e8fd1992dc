// Fibers: stacks of execution that hand the processor to one another by name.
#pragma once

#include <cstddef>

namespace pylora::emu {

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest address; below it lies a page that faults
  size_t stack_bytes = 0;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

/// Gives the fiber a stack, unless it has one, and lets it begin in `entry`, which must not return.
void prepare(Fiber& fiber, void (*entry)());
/// Tells the sanitizers that `fiber` is what runs now, with the stack it runs on.
void adopt_running(Fiber& fiber);
/// To be called first in a fiber's entry; `from` is who switched to it.
void finish_first_switch(Fiber& from);
/// Runs `to` until something switches back. `last`: `from` will not run again.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);
/// Forgets the fiber's execution; its stack stays for the next.
void abandon(Fiber& fiber);
void free_stack(Fiber& fiber);

}  // namespace pylora::emu
