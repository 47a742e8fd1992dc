// The launcher: a stream of words out of blocks. One thread: each block is made from the one before.
#include "cpu/kernel_table.h"
#include "uniform/kernels.h"

PYLORA_KERNEL_TABLE(uniform::Kernels, uniform_kernels)

namespace pylora::uniform {

Status fill_cpu(const FillArgs& args, Mt19937* state) {
  if (args.skip < 0 || args.count < 0) return invalid_argument("uniform: skip, count: expected 0 or more");
  if (state->taken < 0 || state->taken > kStateWords)
    return invalid_argument("uniform: state: expected 0 to 624 taken");
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  const Kernels& kernels = uniform_kernels_table(isa);
  int64_t skip = args.skip, done = 0;
  while (skip > 0 || done < args.count) {
    if (state->taken == kStateWords) {
      kernels.next_block(state->words);
      state->taken = 0;
    }
    const int64_t left = kStateWords - state->taken;
    if (skip > 0) {
      const int64_t passed = skip < left ? skip : left;
      skip -= passed;
      state->taken += passed;
      continue;
    }
    const int64_t count = args.count - done < left ? args.count - done : left;
    kernels.numbers(state->words + state->taken, count, args.bound, args.out + done);
    done += count;
    state->taken += count;
  }
  return {};
}

}  // namespace pylora::uniform
