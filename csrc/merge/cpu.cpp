// The merge launchers on the CPU: pack the factors, share out panels, keep the log.
#include <atomic>
#include <cstring>

#include "cpu/kernel_table.h"
#include "merge/elements.h"
#include "merge/heuristics.h"
#include "merge/kernels.h"

PYLORA_KERNEL_TABLE(merge::Kernels, merge_kernels)
PYLORA_KERNEL_TABLE(merge::Codec, merge_codec)

namespace pylora::merge {

Status check_weight(const Weight& w) {
  if (w.count < 0 || w.rows < 0 || w.columns < 0) return invalid_argument("merge: negative size");
  if (w.rows > 1 && w.row_stride < w.columns) return invalid_argument("merge: w: overlapping rows");
  return {};
}

namespace {

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

/// One call: what the panels share.
class Changing {
 public:
  Changing(const ChangeArgs& args, Isa isa)
      : args_(args), w_(args.weight), kernels_(merge_kernels_table(isa)), codec_(merge_codec_table(isa)) {
    out_bytes_ = packed_matrix_bytes(w_, args_.take_out);
    in_bytes_ = packed_matrix_bytes(w_, args_.put_in);
    char* next = static_cast<char*>(args_.workspace);
    packed_ = take(&next, w_.count * (out_bytes_ + in_bytes_));
    done_ = take(&next, align_up(num_panels()));
    scratch_ = next;
  }

  void pack(const Context& context) {
    const int64_t work = (w_.rows + w_.columns) * (total_rank(args_.take_out) + total_rank(args_.put_in));
    parallel_for(context, w_.count, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t matrix = begin; matrix < end; ++matrix) {
        if (args_.take_out.num_adapters) kernels_.pack[type()](w_, args_.take_out, matrix, taken_out(matrix));
        if (args_.put_in.num_adapters) kernels_.pack[type()](w_, args_.put_in, matrix, put_in(matrix));
      }
    });
  }

  void change(const Context& context) {
    if (args_.write) used_ = args_.write->used;
    if (args_.unchanged) std::memset(done_, 0, static_cast<size_t>(num_panels()));
    for_panels(context, [&](Panel* p) { change_panel(p); });
    if (args_.write) args_.write->used = used_ < args_.write->capacity ? used_.load() : args_.write->capacity;
    if (!args_.unchanged) return;
    *args_.unchanged = unchanged_;
    if (unchanged_) return;
    for_panels(context, [&](Panel* p) {
      if (done_[p->index]) put_back(p);
    });
  }

  int64_t count_log_bytes(const Context& context) {
    std::atomic<int64_t> bytes{0};
    for_panels(context, [&](Panel* p) {
      read_panel(*p, p->before);
      if (args_.take_out.num_adapters) take_out(p);
      put_in(p, true);
      ChunkHeader headers[kMaxPanelChunks];
      bytes += encode(*p, headers);
      restore(*p);
    });
    return bytes;
  }

  bool is_finite(const Context& context) {
    std::atomic<bool> finite{true};
    for_panels(context, [&](Panel* p) {
      if (!finite.load(std::memory_order_relaxed)) return;
      read_panel(*p, p->before);
      p->args.change = &p->in;
      if (!kernels_.is_finite[type()](p->args)) finite = false;
    });
    return finite;
  }

 private:
  /// A panel, its packed factors, and a thread's scratch (heuristics.h).
  struct Panel {
    int64_t index, matrix, first_chunk, num_chunks;
    Elements elements;
    PackedChange out, in;
    PanelArgs args;
    char *before, *between;
    int8_t* codes;
    uint8_t* payloads;

    Panel(const Changing& call, int64_t panel, char* scratch)
        : index(panel), matrix(panel / matrix_panels(call.w_)), elements(call.w_, matrix) {
      const Weight& w = call.w_;
      const int64_t first = panel % matrix_panels(w) * panel_elements(w), left = matrix_elements(w) - first;
      args.first = first;
      args.last = first + (left < panel_elements(w) ? left : panel_elements(w));
      first_chunk = matrix * matrix_chunks(w) + first / kChunk;
      num_chunks = (args.last - args.first + kChunk - 1) / kChunk;
      args.columns = w.columns;
      args.row_stride = w.row_stride;
      args.w = elements.base();
      before = take(&scratch, panel_log_bytes(w));
      between = take(&scratch, panel_log_bytes(w));
      codes = reinterpret_cast<int8_t*>(take(&scratch, panel_elements(w)));
      payloads = reinterpret_cast<uint8_t*>(scratch);
      args.from = before;
      out = call.taken_out(matrix);
      in = call.put_in(matrix);
    }
    Panel(const Panel&) = delete;
    Panel& operator=(const Panel&) = delete;

    int64_t chunk_first(int64_t chunk) const { return args.first + chunk * kChunk; }
    int64_t chunk_elements(int64_t chunk) const {
      const int64_t left = args.last - chunk_first(chunk);
      return left < kChunk ? left : kChunk;
    }
  };

  int type() const { return static_cast<int>(w_.dtype); }
  int64_t num_panels() const { return w_.count * matrix_panels(w_); }
  PackedChange taken_out(int64_t matrix) const { return lay_out(w_, args_.take_out, packed_ + matrix * out_bytes_); }
  PackedChange put_in(int64_t matrix) const {
    return lay_out(w_, args_.put_in, packed_ + w_.count * out_bytes_ + matrix * in_bytes_);
  }

  /// Calls work(panel) for all panels. Threads take them one by one: a slow one does not hold up all.
  template <class Work>
  void for_panels(const Context& context, const Work& work) {
    const int64_t panels = num_panels();
    const int64_t rank = total_rank(args_.take_out) + total_rank(args_.put_in) + 16;
    const int64_t useful = 1 + panels * panel_elements(w_) * rank / kGrainWork;
    int64_t slots = args_.num_slots < panels ? args_.num_slots : panels;
    slots = slots < useful ? slots : useful;
    std::atomic<int64_t> next{0};
    parallel_for(context, slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        int64_t following = next.fetch_add(1, std::memory_order_relaxed);
        while (following < panels) {
          Panel p(*this, following, scratch_ + slot * slot_bytes(w_));
          following = next.fetch_add(1, std::memory_order_relaxed);
          if (following < panels) look_ahead(&p, following);
          work(&p);
        }
      }
    });
  }

  /// The panel that the thread will read next comes into its cache while it computes this one.
  void look_ahead(Panel* p, int64_t following) const {
    const int64_t first = following % matrix_panels(w_) * panel_elements(w_), left = matrix_elements(w_) - first;
    p->args.ahead = Elements(w_, following / matrix_panels(w_)).run(first);
    const int64_t count = left < panel_elements(w_) ? left : panel_elements(w_);
    p->args.ahead_bytes = p->args.ahead ? count * dtype_bytes(w_.dtype) : 0;
  }

  void read_panel(const Panel& p, void* to) const { p.elements.read(p.args.first, p.args.last - p.args.first, to); }

  void change_panel(Panel* p) {
    const Log* read = args_.read;
    const Log* write = args_.write;
    if (read && read->chunks[p->first_chunk].is(ChunkKind::pending)) return;
    if (write && (!write->chunks[p->first_chunk].is(ChunkKind::pending) || used_ >= write->capacity)) return;
    if (!unchanged_.load(std::memory_order_relaxed)) return;
    read_panel(*p, p->before);
    if (args_.unchanged && !has_checksums(*p)) {
      unchanged_ = false;
      return;
    }
    if (args_.take_out.num_adapters) take_out(p);
    if (args_.put_in.num_adapters) put_in(p, write);
    if (write && !write_log(*p)) restore(*p);
    if (args_.unchanged) done_[p->index] = 1;
  }

  /// Whether `before` is what the log was written for.
  bool has_checksums(const Panel& p) const {
    const int64_t size = dtype_bytes(w_.dtype);
    for (int64_t i = 0; i < p.num_chunks; ++i) {
      const uint32_t sum = codec_.checksum(p.before + i * kChunk * size, p.chunk_elements(i) * size);
      if (sum != args_.read->chunks[p.first_chunk + i].checksum) return false;
    }
    return true;
  }

  void take_out(Panel* p) const {
    p->args.change = &p->out;
    kernels_.take_out[type()](p->args);
    const Log* log = args_.read;
    if (!log) return;
    ChunkBuffer buffer;
    for (int64_t i = 0; i < p->num_chunks; ++i) {
      const ChunkHeader& header = log->chunks[p->first_chunk + i];
      if (header.is(ChunkKind::empty)) continue;
      const int64_t count = p->chunk_elements(i);
      with_run(p->elements, p->chunk_first(i), count, buffer.bytes, true, [&](void* run) {
        codec_.correct[type()](header, log->data + header.offset, log->data + log->capacity, count, run);
      });
    }
  }

  void put_in(Panel* p, bool with_codes) const {
    if (args_.take_out.num_adapters) {
      read_panel(*p, p->between);
      p->args.from = p->between;
    }
    p->args.change = &p->in;
    p->args.codes = with_codes ? p->codes : nullptr;
    kernels_.put_in[type()](p->args);
  }

  /// A panel that was taken out is what it was before.
  void put_back(Panel* p) const {
    read_panel(*p, p->before);
    p->args.change = &p->out;
    kernels_.put_in[type()](p->args);
  }

  void restore(const Panel& p) const { p.elements.write(p.args.first, p.args.last - p.args.first, p.before); }

  /// Makes the panel's payloads, one after another, and their headers with offsets from there; returns their bytes.
  int64_t encode(const Panel& p, ChunkHeader* headers) const {
    const int64_t size = dtype_bytes(w_.dtype);
    ChunkBuffer buffer;
    int64_t bytes = 0;
    for (int64_t i = 0; i < p.num_chunks; ++i) {
      const int64_t count = p.chunk_elements(i);
      const char* elements = static_cast<const char*>(p.args.from) + i * kChunk * size;
      const int64_t used =
          codec_.encode[type()](p.codes + i * kChunk, elements, count, &headers[i], p.payloads + bytes);
      with_run(p.elements, p.chunk_first(i), count, buffer.bytes, false,
               [&](void* run) { headers[i].checksum = codec_.checksum(run, count * size); });
      headers[i].offset = static_cast<uint64_t>(bytes);
      headers[i].bytes = static_cast<uint16_t>(used);
      bytes += used;
    }
    return bytes;
  }

  /// false: there is no room for the panel's payloads.
  bool write_log(const Panel& p) {
    ChunkHeader headers[kMaxPanelChunks];
    const int64_t bytes = encode(p, headers);
    Log& log = *args_.write;
    const int64_t offset = used_.fetch_add(bytes);
    if (offset + bytes > log.capacity) return false;
    std::memcpy(log.data + offset, p.payloads, static_cast<size_t>(bytes));
    for (int64_t i = 0; i < p.num_chunks; ++i) {
      headers[i].offset += static_cast<uint64_t>(offset);
      log.chunks[p.first_chunk + i] = headers[i];
    }
    return true;
  }

  const ChangeArgs& args_;
  const Weight& w_;
  const Kernels& kernels_;
  const Codec& codec_;
  int64_t out_bytes_ = 0, in_bytes_ = 0;
  char *packed_, *done_, *scratch_;
  std::atomic<int64_t> used_{0};
  std::atomic<bool> unchanged_{true};
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
  if (args.unchanged && (!args.read || args.put_in.num_adapters)) {
    return invalid_argument("merge: unchanged: expected a log that is taken out, and nothing to put in");
  }
  return {};
}

}  // namespace

Status change_cpu(const Context& context, const ChangeArgs& args) {
  if (const Status status = check_args(args); !status.is_ok()) return status;
  Isa isa;
  if (const Status status = find_isa(args.read, &isa); !status.is_ok()) return status;
  if (args.write) args.write->fused = merge_kernels_table(isa).fused;
  if (args.unchanged) *args.unchanged = true;
  if (matrix_elements(args.weight) == 0 || args.weight.count == 0) return {};
  Changing call(args, isa);
  call.pack(context);
  call.change(context);
  return {};
}

Status count_log_bytes_cpu(const Context& context, const ChangeArgs& args, int64_t* bytes) {
  if (const Status status = check_args(args); !status.is_ok()) return status;
  if (args.read || args.write || !args.put_in.num_adapters) {
    return invalid_argument("merge: log bytes: expected something to put in, and no logs");
  }
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  *bytes = 0;
  if (matrix_elements(args.weight) == 0 || args.weight.count == 0) return {};
  Changing call(args, isa);
  call.pack(context);
  *bytes = call.count_log_bytes(context);
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

}  // namespace pylora::merge
