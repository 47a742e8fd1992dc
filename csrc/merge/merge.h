// merge: a base weight W changed in place by the products of adapters, and changed back bit for bit.
//
//   put in    W' = round(W F + D)           D = sum over adapters of scaling * b a, with the row scales multiplied in
//   take out  W  = round((W' - D) / F)      F = the product of the adapters' row scales, 1 without any
//
// W is stored as `rows` x `columns` with neighbouring columns side by side; `transposed` says that the columns are the
// adapters' output features (Conv1D, embeddings). A stack is `count` such matrices.
//
// Undo log. round((W' - D) / F) is what taking out computes, and it is known while putting in. Where it is not W bit
// for bit, the log holds the difference of the two bit patterns (README.md has the format), so that taking out with the
// log gives W back whatever the values: zeros of either sign, NaN, infinities, overflow.
//
// Numerics. D is summed in f32 (f64 for f64) over the ranks in order, adapter by adapter, each step one fused
// multiply-add, then W F + D is one more and rounded once to W's type. Sets without a fused instruction (scalar on x86)
// multiply and add; that is another arithmetic, which a log records, and taking out runs a set that has the log's.
// Within an arithmetic all bits are the same for any instruction set and number of threads. Subnormals are kept and
// rounding is to nearest even, whatever the calling thread's mode.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/matrix.h"
#include "common/status.h"

namespace pylora::merge {

/// Elements of W, in storage order, that share a log entry.
constexpr int64_t kChunk = 4096;

struct Weight {
  int64_t count = 1;
  int64_t rows = 0;
  int64_t columns = 0;
  DType dtype = DType::f32;
  void* data = nullptr;
  int64_t matrix_stride = 0;  // in elements
  int64_t row_stride = 0;     // in elements, at least `columns`
  bool transposed = false;

  int64_t in_features() const { return transposed ? rows : columns; }
  int64_t out_features() const { return transposed ? columns : rows; }
};

struct Adapter {
  int64_t rank = 0;
  DType dtype = DType::f32;
  ConstMatrix a, b;                    // [rank, in], [out, rank] of the first matrix; any strides
  int64_t a_stride = 0, b_stride = 0;  // from one matrix of a stack to the next, in elements
  double scaling = 1;
  const void* row_scale = nullptr;  // [out], accumulator type, contiguous; null: none
};

/// Adapters that are put in, or have been, in this order.
struct Change {
  const Adapter* adapters = nullptr;
  int64_t num_adapters = 0;
};

enum class ChunkKind : uint8_t { empty, sparse, bitmap, dense, pending = 255 };

struct ChunkHeader {
  uint64_t offset : 56;  // of the payload, from the log's data
  uint64_t kind : 8;     // a ChunkKind
  uint32_t checksum;     // of W' in this chunk
  uint16_t entries;      // pairs of a sparse payload, ones of a bitmap
  uint16_t bytes;        // of the payload

  constexpr bool is(ChunkKind k) const { return kind == static_cast<uint8_t>(k); }
  void set(ChunkKind k) { kind = static_cast<uint8_t>(k); }
};
static_assert(sizeof(ChunkHeader) == 16, "the log is written as bytes");

struct Log {
  ChunkHeader* chunks = nullptr;  // num_chunks(weight)
  uint8_t* data = nullptr;
  int64_t capacity = 0;
  int64_t used = 0;
  bool fused = false;  // the arithmetic: multiply-adds that round once
  bool tiles = false;  // a GPU's log (below)
  /// Of such a log: the architecture of the tensor cores that summed, as in sm_80; 0: the arithmetic of
  /// fused multiply-adds, which is the CPU's too.
  int architecture = 0;
};

struct ChangeArgs {
  Weight weight;
  Change take_out;            // may be empty
  Change put_in;              // may be empty
  const Log* read = nullptr;  // the log of take_out; null: without one. Pending chunks of it are left alone
  /// The log of put_in; null: without one. Only pending chunks are worked on, and those that find no room stay
  /// pending, their part of W as it was.
  Log* write = nullptr;
  /// Where to say whether W is what it was when `read` was written; if not, W is left as it is. null: not checked.
  /// Serves taking out alone: panels are checked as they come, and those that were done are put in again.
  bool* unchanged = nullptr;
  int64_t num_slots = 1;      // threads that may work at once
  void* workspace = nullptr;  // workspace_bytes(args), aligned to 64
};

/// Changes W. unsupported: no instruction set of this machine has the arithmetic of `read`.
Status change_cpu(const Context& context, const ChangeArgs& args);

/// How many bytes of payloads change_cpu would write into a log. Without logs; W is as it was when the call returns, and
/// must not be read meanwhile.
Status count_log_bytes_cpu(const Context& context, const ChangeArgs& args, int64_t* bytes);

/// Whether W has sizes and strides that launchers can go through.
Status check_weight(const Weight& weight);

/// Whether W is what it was when `log` was written, by its checksums.
Status check_unchanged_cpu(const Context& context, const Weight& weight, const Log& log, bool* unchanged);

/// Whether every value that `put_in` would write is finite. Writes nothing.
Status is_finite_cpu(const Context& context, const ChangeArgs& args, bool* finite);

/// Whether every chunk has a payload that its header describes and that lies in the log's data, so that reading the log
/// stays inside it.
bool is_readable(const Weight& weight, const Log& log);

/// Copies headers and payloads, in chunk order, into `to`: its chunks, and data with room for from.used.
void copy_log(const Weight& weight, const Log& from, Log* to);

// ---- on a GPU ----
//
// Pointers are to the GPU's memory, and so are those of Log and Adapter; the structs themselves are the host's.
//
// The log differs in one point from the CPU's: a chunk is a tile of kTileRows x kTileColumns of W (fewer at its edges),
// its elements in row order, chunks in the order of tiles. A GPU's block has such a tile, and no rows of 4096 elements.
// Payloads lie in the order in which blocks came, each from a multiple of kPayloadUnit on.
//
// Numerics. By FMA, D, W' and what taking out gives have the CPU's bits, of its fused arithmetic, for all dtypes. By
// tensor cores (16-bit W), factors times scaling and row scale are split into two bf16 where one does not hold them, sums
// are f32 in sixteens of ranks, and bits are those of an architecture's tensor cores: the log names it.

/// Payloads begin at multiples of this; `used` counts in it.
constexpr int64_t kPayloadUnit = 16;

/// What launches leave in the GPU's memory; zeros before the first.
struct DeviceAnswers {
  int32_t used = 0;        // of the log's data, in units; more than there is if a chunk found no room
  int32_t pending = 0;     // chunks that found no room
  int32_t changed = 0;     // chunks whose W is not what it was when `read` was written
  int32_t not_finite = 0;  // tiles with values that are not
};

struct DeviceArgs {
  Weight weight;
  Change take_out;             // may be empty
  Change put_in;               // may be empty
  const Log* read = nullptr;   // as in ChangeArgs
  const Log* write = nullptr;  // as in ChangeArgs; `used` is in the answers
  bool tensor_cores = false;   // the way to sum; 16-bit W alone
  /// Serves taking out alone: whether W is what it was when `read` was written. If not, it is left as it is.
  bool check = false;
  DeviceAnswers* answers = nullptr;
  void* workspace = nullptr;  // workspace_bytes_cuda(args), aligned to 64
};

/// Queues the change of W.
Status change_cuda(const Context& context, const DeviceArgs& args);

/// Queues the count of chunks of W that are not what they were when `read` was written: answers->changed.
Status check_unchanged_cuda(const Context& context, const DeviceArgs& args);

/// Queues the count of tiles in which `put_in` would write values that are not finite. Writes no W.
Status is_finite_cuda(const Context& context, const DeviceArgs& args);

/// The architecture that tensor cores of the current GPU are known by; 0: there is no GPU.
int tensor_core_architecture();

}  // namespace pylora::merge
