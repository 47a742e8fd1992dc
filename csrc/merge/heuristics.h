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

constexpr int64_t chunk_elements(const Weight& w, int64_t chunk) {
  const int64_t left = matrix_elements(w) - chunk % matrix_chunks(w) * kChunk;
  return left < kChunk ? left : kChunk;
}

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

// ---- on a GPU ----

/// A chunk of a GPU's log.
constexpr int64_t kTileRows = 32, kTileColumns = 128;
static_assert(kTileRows * kTileColumns == kChunk, "headers count elements of a chunk");

constexpr int64_t tiles_down(const Weight& w) { return (w.rows + kTileRows - 1) / kTileRows; }
constexpr int64_t tiles_across(const Weight& w) { return (w.columns + kTileColumns - 1) / kTileColumns; }
constexpr int64_t num_tiles(const Weight& w) { return w.count * tiles_down(w) * tiles_across(w); }

constexpr int64_t tile_elements(const Weight& w, int64_t tile) {
  const int64_t down = w.rows - tile / tiles_across(w) % tiles_down(w) * kTileRows;
  const int64_t across = w.columns - tile % tiles_across(w) * kTileColumns;
  return (down < kTileRows ? down : kTileRows) * (across < kTileColumns ? across : kTileColumns);
}

/// Whether the kernels use tensor cores of themselves.
constexpr bool merges_by_tensor_cores(DType dtype) { return dtype_bytes(dtype) == 2; }

/// The first capacity of a GPU's log data: as on the CPU, and room for a chunk.
constexpr int64_t first_log_capacity_cuda(const Weight& w) {
  const int64_t bytes = w.count * matrix_elements(w) * dtype_bytes(w.dtype) / 16 + kChunk * dtype_bytes(w.dtype);
  return (bytes + kPayloadUnit - 1) / kPayloadUnit * kPayloadUnit;
}

/// Packed factors have lines of whole tiles, so that the kernels need no tail of them.
constexpr int64_t padded_rows(const Weight& w) { return (w.rows + 63) / 64 * 64; }
constexpr int64_t padded_columns(const Weight& w) { return tiles_across(w) * kTileColumns; }

/// A packed element: an accumulator, or two bf16.
constexpr int64_t packed_element_bytes(const Weight& w, bool tensor_cores) {
  return tensor_cores ? 4 : dtype_bytes(accumulator_dtype(w.dtype));
}

constexpr int64_t scale_bytes(const Weight& w) {
  return align_up((w.transposed ? padded_columns(w) : padded_rows(w)) * dtype_bytes(accumulator_dtype(w.dtype)));
}

/// One change, packed: left [count, rank, rows] and right [count, rank, columns], then the products of row scales from
/// each adapter on, and their inverse.
constexpr int64_t packed_bytes_cuda(const Weight& w, const Change& change, bool tensor_cores) {
  const int64_t lines = w.count * total_rank(change) * packed_element_bytes(w, tensor_cores);
  return align_up(lines * padded_rows(w)) + align_up(lines * padded_columns(w)) +
         (change.num_adapters + 1) * scale_bytes(w);
}

/// Both changes packed, and an int a tile: whether it has been taken out.
constexpr int64_t workspace_bytes_cuda(const DeviceArgs& args) {
  return packed_bytes_cuda(args.weight, args.take_out, args.tensor_cores) +
         packed_bytes_cuda(args.weight, args.put_in, args.tensor_cores) + align_up(num_tiles(args.weight) * 4);
}

}  // namespace pylora::merge
