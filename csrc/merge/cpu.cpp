// The merge launchers on the CPU: pack the factors, share out panels, keep the log.
#include <atomic>
#include <cstring>

#include "cpu/kernel_table.h"
#include "merge/heuristics.h"
#include "merge/kernels.h"

PYLORA_KERNEL_TABLE(merge::Kernels, merge_kernels)
PYLORA_KERNEL_TABLE(merge::Codec, merge_codec)

namespace pylora::merge {
namespace {

int index(DType dtype) { return static_cast<int>(dtype); }

Status check_weight(const Weight& w) {
  if (w.count < 0 || w.rows < 0 || w.columns < 0) return invalid_argument("merge: negative size");
  if (w.rows > 1 && w.row_stride < w.columns) return invalid_argument("merge: w: overlapping rows");
  return {};
}

/// The set in use, or, where that computes otherwise than the log was made, the best that does not.
Status find_isa(const Log* read, Isa* isa) {
  if (const Status status = current_isa(isa); !status.is_ok()) return status;
  if (!read || merge_kernels_table(*isa).fused == read->fused) return {};
  bool found = false;
  for (Isa each : kAllIsas) {
    if (!isa_built(each) || !isa_supported(each) || merge_kernels_table(each).fused != read->fused) continue;
    *isa = each;
    found = true;
  }
  return found ? Status{}
               : unsupported(
                     "merge: log: expected the arithmetic of this machine (fused multiply-adds or "
                     "none), got a log made with the other");
}

char* take(char** next, int64_t bytes) {
  char* block = *next;
  *next += bytes;
  return block;
}

/// Where the blocks of one matrix's packed change lie in the workspace.
PackedChange lay_out(const Weight& w, const Change& change, char* base) {
  const int64_t size = dtype_bytes(accumulator_dtype(w.dtype)), columns = w.columns + kMaxTileColumns;
  PackedChange packed;
  packed.rank = total_rank(change);
  packed.by_column = w.transposed;
  for (int64_t i = 0; i < change.num_adapters; ++i)
    packed.scaled |= change.adapters[i].row_scale != nullptr;
  packed.left = take(&base, align_up(w.rows * packed.rank * size));
  packed.right = take(&base, align_up(columns * packed.rank * size));
  packed.scale = take(&base, align_up((w.transposed ? columns : w.rows) * size));
  packed.inverse = base;
  return packed;
}

/// A chunk's bytes as one run: where they lie, or copied to `buffer` if rows are apart in memory.
const void* chunk_bytes(const Weight& w, int64_t matrix, int64_t first, int64_t count, char* buffer) {
  const int64_t size = dtype_bytes(w.dtype);
  const char* base = static_cast<const char*>(w.data) + matrix * w.matrix_stride * size;
  if (w.row_stride == w.columns || w.rows == 1) return base + first * size;
  for (int64_t done = 0; done < count;) {
    const int64_t row = (first + done) / w.columns, column = (first + done) % w.columns;
    const int64_t run = count - done < w.columns - column ? count - done : w.columns - column;
    std::memcpy(buffer + done * size, base + (row * w.row_stride + column) * size, static_cast<size_t>(run * size));
    done += run;
  }
  return buffer;
}

/// One call: what the panels share.
class Changing {
 public:
  Changing(const ChangeArgs& args, Isa isa)
      : args_(args), w_(args.weight), kernels_(merge_kernels_table(isa)), codec_(merge_codec_table(isa)) {}

  void pack(const Context& context) {
    out_bytes_ = packed_matrix_bytes(w_, args_.take_out);
    in_bytes_ = packed_matrix_bytes(w_, args_.put_in);
    const bool f64 = accumulator_dtype(w_.dtype) == DType::f64;
    const int64_t work = (w_.rows + w_.columns) * (total_rank(args_.take_out) + total_rank(args_.put_in));
    parallel_for(context, w_.count, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t matrix = begin; matrix < end; ++matrix) {
        if (args_.take_out.num_adapters) kernels_.pack[f64](w_, args_.take_out, matrix, taken_out(matrix));
        if (args_.put_in.num_adapters) kernels_.pack[f64](w_, args_.put_in, matrix, put_in(matrix));
      }
    });
  }

  /// Calls work(panel, slot's scratch) for all panels. Threads take them one by one: a slow one does not hold up all.
  template <class Work>
  void for_panels(const Context& context, const Work& work) {
    const int64_t panels = w_.count * matrix_panels(w_);
    const int64_t rank = total_rank(args_.take_out) + total_rank(args_.put_in) + 16;
    const int64_t useful = 1 + panels * panel_elements(w_) * rank / kGrainWork;
    int64_t slots = args_.num_slots < panels ? args_.num_slots : panels;
    slots = slots < useful ? slots : useful;
    char* scratch = static_cast<char*>(args_.workspace) + w_.count * (out_bytes_ + in_bytes_);
    std::atomic<int64_t> next{0};
    parallel_for(context, slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t panel; (panel = next.fetch_add(1, std::memory_order_relaxed)) < panels;)
          work(panel, scratch + slot * slot_bytes(w_));
    });
  }

  void change(const Context& context) {
    if (args_.write) used_ = args_.write->used;
    for_panels(context, [&](int64_t panel, char* scratch) { change_panel(panel, scratch); });
    if (args_.write) args_.write->used = used_ < args_.write->capacity ? used_.load() : args_.write->capacity;
  }

  bool is_finite(const Context& context) {
    std::atomic<bool> finite{true};
    for_panels(context, [&](int64_t panel, char*) {
      if (!finite.load(std::memory_order_relaxed)) return;
      const Panel p(*this, panel, nullptr);
      if (!kernels_.is_finite[index(w_.dtype)](p.args)) finite = false;
    });
    return finite;
  }

 private:
  /// One panel's arguments with the packed factors that they point to.
  struct Panel {
    int64_t matrix, first_chunk, num_chunks;
    PackedChange out, in;
    PanelArgs args;

    Panel(const Changing& call, int64_t panel, void* residual) {
      const Weight& w = call.w_;
      matrix = panel / matrix_panels(w);
      const int64_t first = panel % matrix_panels(w) * panel_elements(w), left = matrix_elements(w) - first;
      args.first = first;
      args.last = first + (left < panel_elements(w) ? left : panel_elements(w));
      first_chunk = matrix * matrix_chunks(w) + first / kChunk;
      num_chunks = (args.last - args.first + kChunk - 1) / kChunk;
      args.columns = w.columns;
      args.row_stride = w.row_stride;
      args.w = static_cast<char*>(w.data) + matrix * w.matrix_stride * dtype_bytes(w.dtype);
      args.residual = residual;
      out = call.taken_out(matrix);
      in = call.put_in(matrix);
      args.take_out = call.args_.take_out.num_adapters ? &out : nullptr;
      args.put_in = call.args_.put_in.num_adapters ? &in : nullptr;
    }
    Panel(const Panel&) = delete;
    Panel& operator=(const Panel&) = delete;

    int64_t chunk_elements(int64_t chunk) const {
      const int64_t left = args.last - args.first - chunk * kChunk;
      return left < kChunk ? left : kChunk;
    }
  };

  PackedChange taken_out(int64_t matrix) const {
    return lay_out(w_, args_.take_out, static_cast<char*>(args_.workspace) + matrix * out_bytes_);
  }
  PackedChange put_in(int64_t matrix) const {
    return lay_out(w_, args_.put_in, static_cast<char*>(args_.workspace) + w_.count * out_bytes_ + matrix * in_bytes_);
  }

  void change_panel(int64_t panel, char* scratch) {
    Panel p(*this, panel, scratch);
    const Log* read = args_.read;
    Log* write = args_.write;
    if (read && read->chunks[p.first_chunk].is(ChunkKind::pending)) return;
    if (write && (!write->chunks[p.first_chunk].is(ChunkKind::pending) || used_ >= write->capacity)) return;
    if (read) {
      for (int64_t i = 0; i < p.num_chunks; ++i) {
        const ChunkHeader& header = read->chunks[p.first_chunk + i];
        codec_.decode[index(w_.dtype)](header, read->data + header.offset, read->data + read->capacity,
                                       p.chunk_elements(i), scratch + i * kChunk * dtype_bytes(w_.dtype));
      }
    }
    p.args.read_residual = read;
    p.args.write_residual = write;
    kernels_.panel[index(w_.dtype)](p.args);
    if (write && !write_log(p, scratch)) restore(&p);
  }

  /// false: there is no room for the panel's payloads.
  bool write_log(const Panel& p, const char* residual) {
    ChunkHeader headers[kMaxPanelChunks];
    alignas(64) char buffer[kChunk * sizeof(double)];
    uint8_t* payloads = reinterpret_cast<uint8_t*>(const_cast<char*>(residual)) + panel_log_bytes(w_);
    int64_t bytes = 0;
    for (int64_t i = 0; i < p.num_chunks; ++i) {
      const int64_t count = p.chunk_elements(i), size = dtype_bytes(w_.dtype);
      const int64_t used =
          codec_.encode[index(w_.dtype)](residual + i * kChunk * size, count, &headers[i], payloads + bytes);
      const void* run = chunk_bytes(w_, p.matrix, p.args.first + i * kChunk, count, buffer);
      headers[i].checksum = codec_.checksum(run, count * size);
      headers[i].offset = static_cast<uint64_t>(bytes);
      headers[i].bytes = static_cast<uint16_t>(used);
      bytes += used;
    }
    Log& log = *args_.write;
    const int64_t offset = used_.fetch_add(bytes);
    if (offset + bytes > log.capacity) return false;
    std::memcpy(log.data + offset, payloads, static_cast<size_t>(bytes));
    for (int64_t i = 0; i < p.num_chunks; ++i) {
      headers[i].offset += static_cast<uint64_t>(offset);
      log.chunks[p.first_chunk + i] = headers[i];
    }
    return true;
  }

  /// The panel as it was before: the way back is what the residuals are for.
  void restore(Panel* p) {
    const PackedChange* out = p->args.take_out;
    p->args.take_out = p->args.put_in;
    p->args.put_in = out;
    p->args.read_residual = true;
    p->args.write_residual = false;
    kernels_.panel[index(w_.dtype)](p->args);
  }

  const ChangeArgs& args_;
  const Weight& w_;
  const Kernels& kernels_;
  const Codec& codec_;
  int64_t out_bytes_ = 0, in_bytes_ = 0;
  std::atomic<int64_t> used_{0};
};

bool has_ranks(const Change& change) {
  for (int64_t i = 0; i < change.num_adapters; ++i)
    if (change.adapters[i].rank < 1) return false;
  return true;
}

Status check_args(const ChangeArgs& args) {
  if (const Status status = check_weight(args.weight); !status.is_ok()) return status;
  if (!has_ranks(args.take_out) || !has_ranks(args.put_in)) {
    return invalid_argument("merge: rank: expected at least 1");
  }
  if (!args.take_out.num_adapters && !args.put_in.num_adapters) {
    return invalid_argument("merge: adapters: expected at least one");
  }
  if (args.num_slots < 1) return invalid_argument("merge: num_slots: expected at least 1");
  return {};
}

}  // namespace

Status change_cpu(const Context& context, const ChangeArgs& args) {
  if (const Status status = check_args(args); !status.is_ok()) return status;
  Isa isa;
  if (const Status status = find_isa(args.read, &isa); !status.is_ok()) return status;
  if (args.write) args.write->fused = merge_kernels_table(isa).fused;
  if (matrix_elements(args.weight) == 0 || args.weight.count == 0) return {};
  Changing call(args, isa);
  call.pack(context);
  call.change(context);
  return {};
}

Status is_finite_cpu(const Context& context, const ChangeArgs& args, bool* finite) {
  if (const Status status = check_args(args); !status.is_ok()) return status;
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  *finite = true;
  if (matrix_elements(args.weight) == 0 || args.weight.count == 0) return {};
  Changing call(args, isa);
  call.pack(context);
  *finite = call.is_finite(context);
  return {};
}

Status check_unchanged_cpu(const Context& context, const Weight& weight, const Log& log, bool* unchanged) {
  if (const Status status = check_weight(weight); !status.is_ok()) return status;
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  const Codec& codec = merge_codec_table(isa);
  std::atomic<bool> same{true};
  parallel_for(context, num_chunks(weight), kGrainWork / kChunk, [&](int64_t begin, int64_t end) {
    alignas(64) char buffer[kChunk * sizeof(double)];
    for (int64_t i = begin; i < end && same.load(std::memory_order_relaxed); ++i) {
      const int64_t matrix = i / matrix_chunks(weight), first = i % matrix_chunks(weight) * kChunk;
      const int64_t left = matrix_elements(weight) - first, count = left < kChunk ? left : kChunk;
      const void* run = chunk_bytes(weight, matrix, first, count, buffer);
      if (codec.checksum(run, count * dtype_bytes(weight.dtype)) != log.chunks[i].checksum) same = false;
    }
  });
  *unchanged = same;
  return {};
}

bool is_readable(const Weight& weight, const Log& log) {
  const int64_t size = dtype_bytes(weight.dtype);
  for (int64_t i = 0; i < num_chunks(weight); ++i) {
    const int64_t left = matrix_elements(weight) - i % matrix_chunks(weight) * kChunk;
    const int64_t count = left < kChunk ? left : kChunk;
    const ChunkHeader& h = log.chunks[i];
    int64_t least = 0;
    if (h.is(ChunkKind::sparse))
      least = 2 * int64_t{h.entries};
    else if (h.is(ChunkKind::bitmap))
      least = (count + 7) / 8 + h.entries;
    else if (h.is(ChunkKind::dense))
      least = count * size;
    else if (!h.is(ChunkKind::empty))
      return false;
    if (h.bytes < least || h.offset + h.bytes > static_cast<uint64_t>(log.capacity)) return false;
  }
  return true;
}

void copy_log(const Weight& weight, const Log& from, Log* to) {
  to->used = 0;
  to->fused = from.fused;
  for (int64_t i = 0; i < num_chunks(weight); ++i) {
    ChunkHeader header = from.chunks[i];
    if (!header.is(ChunkKind::pending)) {
      std::memcpy(to->data + to->used, from.data + header.offset, header.bytes);
      header.offset = static_cast<uint64_t>(to->used);
      to->used += header.bytes;
    }
    to->chunks[i] = header;
  }
}

}  // namespace pylora::merge
