// The undo log as a tensor: a header, chunk headers, payloads.
#pragma once

#include <cstring>

#include "merge/arguments.h"

namespace pylora::merge {

/// A log tensor begins with this; chunk headers and payloads follow.
struct LogHeader {
  char magic[8] = {'P', 'Y', 'L', 'O', 'R', 'A', 'M', '2'};
  int64_t count = 0, rows = 0, columns = 0;
  int64_t data_bytes = 0;
  uint8_t dtype = 0;
  uint8_t fused = 0;
  uint8_t transposed = 0;
  uint8_t tiles = 0;         // chunks are tiles: a GPU's log
  uint8_t architecture = 0;  // of the tensor cores that summed
  uint8_t reserved[19] = {};

  LogHeader() = default;
  LogHeader(const Weight& w, const Log& log, int64_t payload_bytes)
      : count(w.count),
        rows(w.rows),
        columns(w.columns),
        data_bytes(payload_bytes),
        dtype(static_cast<uint8_t>(w.dtype)),
        fused(log.fused),
        transposed(w.transposed),
        tiles(log.tiles),
        architecture(static_cast<uint8_t>(log.architecture)) {}
};
static_assert(sizeof(LogHeader) == 64, "the log is written as bytes");

/// Header and chunk headers.
inline int64_t fixed_bytes(const Weight& w, bool tiles) {
  const int64_t chunks = tiles ? num_tiles(w) : num_chunks(w);
  return static_cast<int64_t>(sizeof(LogHeader)) + chunks * static_cast<int64_t>(sizeof(ChunkHeader));
}

/// What of a log was read: one of a merge, whole, and of such a weight; its errors name the argument.
class LogReader {
 public:
  LogReader(const char* op, const char* name, const Weight& w) : op_(op), name_(name), w_(w) {}

  /// log: on `device`.
  void check_tensor(const Tensor& log, at::Device device) const {
    TORCH_CHECK_TYPE(log.scalar_type() == at::kByte, op_, ": ", name_, ": expected uint8, got ", log.scalar_type());
    TORCH_CHECK_VALUE(log.device() == device && log.dim() == 1 && log.is_contiguous(), op_, ": ", name_,
                      ": expected a contiguous vector on ", device.is_cpu() ? std::string("the CPU") : device.str(),
                      ", got shape ", log.sizes(), " on ", log.device());
    TORCH_CHECK_VALUE(log.numel() >= static_cast<int64_t>(sizeof(LogHeader)), op_, ": ", name_,
                      ": expected the log of a merge, got ", log.numel(), " bytes");
  }

  /// fixed: the log's first bytes in the CPU's memory, at least a LogHeader. The chunks are still to be pointed to.
  Log read_header(const void* fixed, bool tiles, int64_t log_bytes) {
    LogHeader header;
    std::memcpy(&header, fixed, sizeof header);
    TORCH_CHECK_VALUE(std::memcmp(header.magic, LogHeader().magic, sizeof header.magic) == 0, op_, ": ", name_,
                      ": expected the log of a merge, got other bytes");
    TORCH_CHECK_VALUE(header.count == w_.count && header.rows == w_.rows && header.columns == w_.columns &&
                          header.dtype == static_cast<uint8_t>(w_.dtype) && header.transposed == w_.transposed,
                      op_, ": ", name_, ": expected the log of a weight of this shape, layout and dtype, got that of ",
                      header.count, " x ", header.rows, " x ", header.columns, " as stored");
    TORCH_CHECK_NOT_IMPLEMENTED(header.tiles == tiles, op_, ": ", name_, ": expected the log of a merge on ",
                                where(tiles), ", got that of one on ", where(header.tiles),
                                ", which can be undone there");
    data_bytes_ = header.data_bytes;
    Log log;
    log.capacity = log_bytes - fixed_bytes(w_, tiles);
    log.fused = header.fused;
    log.tiles = tiles;
    log.architecture = header.architecture;
    return log;
  }

  /// log: with chunks in the CPU's memory.
  void check_whole(const Log& log) const {
    TORCH_CHECK_VALUE(log.capacity >= 0 && log.capacity == data_bytes_ && is_readable(w_, log), op_, ": ", name_,
                      ": expected the whole log of a merge, got a damaged one");
  }

 private:
  static const char* where(bool tiles) { return tiles ? "a GPU" : "the CPU"; }

  const char *op_, *name_;
  const Weight& w_;
  int64_t data_bytes_ = 0;
};

}  // namespace pylora::merge
