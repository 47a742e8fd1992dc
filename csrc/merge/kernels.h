// The kernels of one instruction set. "C" below is the accumulator type of W, f32 or f64; residuals are unsigned
// integers of W's width.
#pragma once

#include "merge/merge.h"

namespace pylora::merge {

/// One matrix's change, packed (heuristics.h), C throughout.
struct PackedChange {
  int64_t rank = 0;
  void* left = nullptr;
  void* right = nullptr;
  void* scale = nullptr;    // [rows] or [columns]
  void* inverse = nullptr;  // 1 / scale; 0 where that is not finite
  bool scaled = false;      // some scale is given
  bool by_column = false;   // scale and inverse lie along the columns
};

/// Elements [first, last) of one matrix.
struct PanelArgs {
  int64_t first = 0, last = 0, columns = 0;
  void* w = nullptr;  // the matrix
  int64_t row_stride = 0;
  const PackedChange* take_out = nullptr;
  const PackedChange* put_in = nullptr;
  void* residual = nullptr;  // of element `first` and those after it
  bool read_residual = false, write_residual = false;
};

struct Kernels {
  /// Packs `change` of matrix `index`; the blocks of `packed` have been laid out.
  using Pack = void (*)(const Weight& weight, const Change& change, int64_t index, const PackedChange& packed);
  /// Takes out, puts in, or both.
  using Panel = void (*)(const PanelArgs& args);
  /// Whether what put_in would write is finite.
  using IsFinite = bool (*)(const PanelArgs& args);

  bool fused;
  Pack pack[2];  // [C is f64]
  Panel panel[kNumDTypes];
  IsFinite is_finite[kNumDTypes];
};

struct Codec {
  /// Residuals of `count` <= kChunk elements as a payload; returns its bytes, at most count * width, and sets the
  /// header's kind and entries.
  using Encode = int64_t (*)(const void* residual, int64_t count, ChunkHeader* header, uint8_t* out);
  /// All residuals of a chunk, the zeros too. `end`: of the log's data.
  using Decode = void (*)(const ChunkHeader& header, const uint8_t* payload, const uint8_t* end, int64_t count,
                          void* residual);
  /// Of bytes in memory; sensitive to their order, and to any change of one 32-bit word.
  using Checksum = uint32_t (*)(const void* data, int64_t bytes);

  Encode encode[kNumDTypes];
  Decode decode[kNumDTypes];
  Checksum checksum;
};

}  // namespace pylora::merge
