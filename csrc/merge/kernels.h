// The kernels of one instruction set. "C" below is the accumulator type of W, f32 or f64.
#pragma once

#include "merge/merge.h"

namespace pylora::merge {

/// One matrix's change, packed (heuristics.h), C throughout. Along the columns of a tile everything lies in the order
/// of row.h.
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
  const PackedChange* change = nullptr;
  const void* from = nullptr;  // the elements, one after another
  void* w = nullptr;           // the matrix, written
  int64_t row_stride = 0;
  const void* ahead = nullptr;  // memory that will be read next, to be fetched meanwhile
  int64_t ahead_bytes = 0;
  int8_t* codes = nullptr;  // of the elements, one after another; null: not wanted
};

struct Kernels {
  /// Packs `change` of matrix `index`; the blocks of `packed` have been laid out.
  using Pack = void (*)(const Weight& weight, const Change& change, int64_t index, const PackedChange& packed);
  using Panel = void (*)(const PanelArgs& args);
  /// Whether what put_in would write is finite.
  using IsFinite = bool (*)(const PanelArgs& args);

  bool fused;
  Pack pack[kNumDTypes];
  Panel put_in[kNumDTypes];
  Panel take_out[kNumDTypes];  // codes are not used
  IsFinite is_finite[kNumDTypes];
};

constexpr int64_t kPayloadSlack = 8;

struct Codec {
  /// The codes of `count` <= kChunk elements, or the elements `w` themselves where a code cannot say it, as a payload;
  /// returns its bytes, at most those of w, and sets the header's kind and entries. Reads whole 64 codes and changes
  /// some; writes up to kPayloadSlack bytes beyond the payload.
  using Encode = int64_t (*)(int8_t* codes, const void* w, int64_t count, ChunkHeader* header, uint8_t* out);
  /// Corrects what taking out computed, in place. `end`: of the log's data.
  using Correct = void (*)(const ChunkHeader& header, const uint8_t* payload, const uint8_t* end, int64_t count,
                           void* w);
  /// Of bytes in memory; sensitive to their order, and to any change of one 32-bit word.
  using Checksum = uint32_t (*)(const void* data, int64_t bytes);

  Encode encode[kNumDTypes];
  Correct correct[kNumDTypes];
  Checksum checksum;
};

}  // namespace pylora::merge
