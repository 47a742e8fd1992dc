// The undo log on the CPU as a whole: whether W is what it was written for, whether it can be read, its copy in order.
#include <atomic>
#include <cstring>

#include "cpu/kernel_table.h"
#include "merge/elements.h"
#include "merge/heuristics.h"
#include "merge/kernels.h"

PYLORA_KERNEL_TABLE(merge::Codec, merge_codec)

namespace pylora::merge {

Status check_unchanged_cpu(const Context& context, const Weight& weight, const Log& log, bool* unchanged) {
  if (const Status status = check_weight(weight); !status.is_ok()) return status;
  Isa isa;
  if (const Status status = current_isa(&isa); !status.is_ok()) return status;
  const Codec& codec = merge_codec_table(isa);
  std::atomic<bool> same{true};
  parallel_for(context, num_chunks(weight), kGrainWork / kChunk, [&](int64_t begin, int64_t end) {
    ChunkBuffer buffer;
    for (int64_t i = begin; i < end && same.load(std::memory_order_relaxed); ++i) {
      const int64_t matrix = i / matrix_chunks(weight), first = i % matrix_chunks(weight) * kChunk;
      const int64_t count = chunk_elements(weight, i);
      with_run(Elements(weight, matrix), first, count, buffer.bytes, false, [&](void* run) {
        if (codec.checksum(run, count * dtype_bytes(weight.dtype)) != log.chunks[i].checksum) same = false;
      });
    }
  });
  *unchanged = same;
  return {};
}

bool is_readable(const Weight& weight, const Log& log) {
  const int64_t size = dtype_bytes(weight.dtype);
  for (int64_t i = 0; i < (log.tiles ? num_tiles(weight) : num_chunks(weight)); ++i) {
    const int64_t count = log.tiles ? tile_elements(weight, i) : chunk_elements(weight, i);
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
    if (log.tiles && h.offset % kPayloadUnit != 0) return false;
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
