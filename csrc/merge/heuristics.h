// Sizes that callers and launchers must agree on: pure functions of the shape.
#pragma once

#include "common/sizes.h"
#include "merge/merge.h"

namespace pylora::merge {

/// The widest column tile of all instruction sets: two vectors of 64 bytes of f32.
constexpr int64_t kMaxTileColumns = 32;

/// A panel is what a thread works on at once: about 12 rows, so that the right factor is read from L2 once for two
/// tiles of rows, and at most 64 K elements, which stay in L2.
constexpr int64_t kPanelRows = 12, kMinPanelChunks = 4, kMaxPanelChunks = 16;

constexpr int64_t matrix_elements(const Weight& w) { return w.rows * w.columns; }
constexpr int64_t matrix_chunks(const Weight& w) { return (matrix_elements(w) + kChunk - 1) / kChunk; }
constexpr int64_t num_chunks(const Weight& w) { return w.count * matrix_chunks(w); }

constexpr int64_t panel_chunks(const Weight& w) {
  const int64_t wanted = (kPanelRows * w.columns + kChunk - 1) / kChunk;
  return wanted < kMinPanelChunks ? kMinPanelChunks : wanted > kMaxPanelChunks ? kMaxPanelChunks : wanted;
}
constexpr int64_t panel_elements(const Weight& w) { return panel_chunks(w) * kChunk; }
constexpr int64_t matrix_panels(const Weight& w) { return (matrix_chunks(w) + panel_chunks(w) - 1) / panel_chunks(w); }

/// Log data that one panel can need: a dense payload for every chunk.
constexpr int64_t panel_log_bytes(const Weight& w) { return panel_elements(w) * dtype_bytes(w.dtype); }

/// First capacity of a log's data: twice what a delta of 2 % of W takes, and room for a panel.
constexpr int64_t first_log_capacity(const Weight& w) {
  return w.count * matrix_elements(w) * dtype_bytes(w.dtype) / 16 + panel_log_bytes(w);
}

constexpr int64_t total_rank(const Change& change) {
  int64_t rank = 0;
  for (int64_t i = 0; i < change.num_adapters; ++i)
    rank += change.adapters[i].rank;
  return rank;
}

/// One matrix's factors as accumulators: left [rows, rank], right [column tiles, rank, tile], and the row scales with
/// their inverses, along the rows or the columns.
constexpr int64_t packed_matrix_bytes(const Weight& w, const Change& change) {
  const int64_t size = dtype_bytes(accumulator_dtype(w.dtype)), columns = w.columns + kMaxTileColumns;
  const int64_t scales = w.transposed ? columns : w.rows;
  return align_up(w.rows * total_rank(change) * size) + align_up(columns * total_rank(change) * size) +
         2 * align_up(scales * size);
}

/// A thread's scratch: a panel of W as it was, the same between taking out and putting in, the codes of a panel, and
/// its payloads.
constexpr int64_t slot_bytes(const Weight& w) {
  return 3 * panel_log_bytes(w) + panel_elements(w) + kWorkspaceAlignment;
}

/// The packed factors, a byte a panel, and scratch.
constexpr int64_t workspace_bytes(const ChangeArgs& args) {
  const Weight& w = args.weight;
  return w.count * (packed_matrix_bytes(w, args.take_out) + packed_matrix_bytes(w, args.put_in)) +
         align_up(w.count * matrix_panels(w)) + args.num_slots * slot_bytes(w);
}

}  // namespace pylora::merge
