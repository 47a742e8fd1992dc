// Launchers of the kernels that the emulator is tested with.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/status.h"
#include "cuda/device.cuh"

namespace pylora::emu_tests {

constexpr int kCollectives = 6;

struct MmaArgs {
  int kind = 0;                 // 0 bf16, 1 f16, 2 tf32
  const uint32_t* a = nullptr;  // [32, 4]
  const uint32_t* b = nullptr;  // [32, 2]
  float* d = nullptr;           // [32, 4], in and out
};

struct MatrixArgs {
  int count = 4;
  bool transposed = false;
  const uint16_t* rows = nullptr;  // [8 count, 8]
  uint32_t* registers = nullptr;   // [32, count]
};

struct CollectiveArgs {
  uint32_t mask = 0;
  int operand = 0, width = 32;
  int* out = nullptr;  // [kCollectives, 32]
};

struct AtomicArgs {
  int blocks = 1, threads = 32;
  float* f32 = nullptr;
  int* i32 = nullptr;
  bf16* pairs_bf16 = nullptr;
  f16* pairs_f16 = nullptr;
  int* cas = nullptr;
};

struct IndexArgs {
  int* out = nullptr;  // [24 blocks, 30 threads]
};

struct CountArgs {
  int bytes = 4, stride = 4, uniform_loads = 0, copied_bytes = 0;
  const unsigned char* x = nullptr;
  unsigned char* y = nullptr;
};

struct PipeArgs {
  const float* x = nullptr;  // [8, 32]
  float* y = nullptr;        // [8, 32], rows reversed
};

struct ConvertArgs {
  int64_t count = 0;
  DType dtype = DType::bf16;
  const float* x = nullptr;
  void* narrowed = nullptr;
  float* widened = nullptr;
  float* paired = nullptr;
};

Status mma(const Context& context, const MmaArgs& args);
Status ldmatrix(const Context& context, const MatrixArgs& args);
Status collectives(const Context& context, const CollectiveArgs& args);
Status atomics(const Context& context, const AtomicArgs& args);
Status index(const Context& context, const IndexArgs& args);
Status count(const Context& context, const CountArgs& args);
Status pipe(const Context& context, const PipeArgs& args);
Status convert(const Context& context, const ConvertArgs& args);

/// A kernel with a seeded fault, or without one (bugs.cu).
struct BugArgs {
  int bug = 0;  // 0: none; the kernel says which there are
  int offset = 0, blocks = 1;
  const float* x = nullptr;
  float* y = nullptr;
  int* counter = nullptr;
};

Status stage(const Context& context, const BugArgs& args);
Status warp_exchange(const Context& context, const BugArgs& args);
Status barriers(const Context& context, const BugArgs& args);
Status lanes(const Context& context, const BugArgs& args);
Status bounds(const Context& context, const BugArgs& args);
Status shared(const Context& context, const BugArgs& args);
Status last_block(const Context& context, const BugArgs& args);
Status fragments(const Context& context, const BugArgs& args);

}  // namespace pylora::emu_tests
